"""DDIM and DDPM sampling: Song et al. 2021 (DDIM, arXiv 2010.02502), equations 12 and 16.

The discrete VP process is the VE process x_t / sqrt(abar_t) at noise levels sigma_t = sqrt((1 - abar_t) / abar_t), so
that any denoiser can be sampled in this way. In these coordinates the step from sigma to sigma' is
x' = D + sqrt(sigma'^2 - s^2) (x - D) / sigma + s z,  s = eta sigma' sqrt(1 - sigma'^2 / sigma^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.diffusion import ddpm_schedule
from cm.diffusion.schedules import append_zero
from cm.errors import UserError
from cm.registry import lookup
from cm.samplers.base import Sampler, lerp_to
from cm.samplers.euler_maruyama import check_eta
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource


@dataclass(frozen=True)
class DDIM(Sampler):
    """One evaluation per step: Euler's method for eta 0 and ancestral sampling for eta 1, on the levels of DDPM.

    :param eta: amount of fresh noise: 0 gives DDIM, 1 gives DDPM (equation 16).
    :param spacing: which timesteps, see `SPACINGS`.
    :raises UserError: if eta is outside [0, 1], or there is no such spacing.
    """

    eta: float = 0.0
    spacing: str = "ends"

    accepts_churn: ClassVar[bool] = False
    uses_rho: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_eta(self.eta)
        lookup(SPACINGS, self.spacing, "spacing")

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """The levels of `steps` timesteps between sigma_min and sigma_max, then 0: float64 [steps+1].

        :raises UserError: if there are fewer such timesteps than steps.
        """
        return append_zero(timestep_grid(steps, sigma_min, sigma_max, self.spacing))

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """Equation 12 in terms of noise levels, see the module; with eta 0 it uses no random numbers."""
        noise_up = self.eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
        mean = lerp_to(D(x, sigma), x, (sigma_next**2 - noise_up**2).clamp(min=0).sqrt() / sigma)
        return mean if self.eta == 0 else mean + append_dims(noise_up, x.ndim) * rng.randn_like(x)


def _ends(steps: int, known: int) -> Tensor:
    from_last = th.linspace(0, known - 1, steps, dtype=th.float64).round().long()       # a single step is the last
    return (known - 1 - from_last).flip(0)


def _uniform(steps: int, known: int) -> Tensor:
    return th.arange(steps) * (known // steps)


def _quad(steps: int, known: int) -> Tensor:
    return th.linspace(0, (0.8 * known) ** 0.5, steps, dtype=th.float64).square().add(1e-9).long()


SPACINGS: dict[str, Callable[[int, int], Tensor]] = {"ends": _ends, "uniform": _uniform, "quad": _quad}
"""--spacing -> (steps, number of timesteps known) -> their indices, rising, [steps].

ends: evenly from the first to the last; uniform: 0, T / S, 2 T / S, ..., as in the published code of DDIM and SA-DPM
(0, 100, ..., 900 for 10 steps of 1000); quad: squares, finer near the image, up to 0.8 T (DDIM, appendix D.2).
"""


def timestep_grid(steps: int, sigma_min: float, sigma_max: float, spacing: str = "ends") -> Tensor:
    """The falling noise levels of timesteps between sigma_min and sigma_max: [steps].

    :param spacing: an entry of `SPACINGS`.
    :raises UserError: if there are fewer such timesteps than steps.
    """
    levels = ddpm_schedule.sigmas()
    known = levels[(levels >= sigma_min) & (levels <= sigma_max)]
    if steps > len(known):
        raise UserError(f"--steps {steps}: only {len(known)} of the {ddpm_schedule.TIMESTEPS} timesteps have noise "
                        f"levels between sigma_min {sigma_min:g} and sigma_max {sigma_max:g}")
    places = SPACINGS[spacing](steps, len(known))
    if len(places.unique()) < steps:
        raise UserError(f"--steps {steps}: --spacing {spacing} names some of the {len(known)} timesteps twice; take "
                        "fewer steps, or another spacing")
    return known[places].flip(0)
