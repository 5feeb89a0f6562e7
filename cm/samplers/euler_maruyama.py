"""The Euler-Maruyama method for the reverse SDE: Song et al. 2021 (arXiv 2011.13456), equation 6, for any eta.

The probability-flow ODE and the reverse SDE belong to one family with the same marginals, and eta chooses a member:
dx = -(1 + eta^2) sigma score dsigma + eta sqrt(2 sigma) dw, where sigma falls and score = (D - x) / sigma^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from cm.errors import UserError
from cm.samplers.base import Sampler, lerp_to
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource


class NoiseInWindow(Sampler):
    """Base class of samplers that add fresh noise, of the amount `eta`, at levels from `s_tmin` to `s_tmax`."""

    eta: float
    s_tmin: float
    s_tmax: float

    def at(self, sigma: Tensor) -> NoiseInWindow:
        """The sampler without a window, and without fresh noise if the level is outside the window."""
        if self.has_no_window():
            return self
        is_inside = bool(eta_at(sigma, 1.0, self.s_tmin, self.s_tmax))
        return replace(self, eta=self.eta if is_inside else 0.0, s_tmin=0.0, s_tmax=math.inf)

    def has_no_window(self) -> bool:
        """Whether the window contains all levels."""
        return self.s_tmin <= 0 and self.s_tmax == math.inf

    def adds_noise(self, eta: Tensor) -> bool:
        """Whether a step with eta [N] adds noise: it waits for the device only if `at` was not called before."""
        return self.eta > 0 if self.has_no_window() else bool(eta.any())


@dataclass(frozen=True)
class EulerMaruyama(NoiseInWindow):
    """One evaluation per step. `order` is the strong order.

    :param eta: amount of fresh noise: 1 gives the reverse SDE, 0 gives Euler's method for the ODE.
    :param s_tmin, s_tmax: the noise levels, inclusive, at which there is fresh noise; elsewhere eta is 0.
    :raises UserError: if eta is outside [0, 1].
    """

    eta: float = 1.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf

    accepts_churn: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_eta(self.eta)

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """One Euler-Maruyama step; without fresh noise at these levels it uses no random numbers."""
        eta = eta_at(sigma, self.eta, self.s_tmin, self.s_tmax)     # [N]
        fall = sigma - sigma_next
        x_next = lerp_to(D(x, sigma), x, 1 - (1 + eta**2) * fall / sigma)
        if not self.adds_noise(eta):
            return x_next
        return x_next + append_dims(eta * (2 * sigma * fall).sqrt(), x.ndim) * rng.randn_like(x)


def check_eta(eta: float) -> None:
    """:raises UserError: if eta is outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta:g} must lie between 0, no fresh noise, and 1, that of the reverse SDE")


def eta_at(sigma: Tensor, eta: float, s_tmin: float, s_tmax: float) -> Tensor:
    """eta at these noise levels, [N] -> [N]: 0 outside of s_tmin..s_tmax."""
    return eta * ((sigma >= s_tmin) & (sigma <= s_tmax)).to(sigma.dtype)
