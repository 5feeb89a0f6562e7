"""Grids of noise levels, and the noise schedules of the older diffusion processes over time.

Source: Karras et al. 2022 (EDM, arXiv 2206.00364), equation 5 and table 1. `karras_sigma` holds the one
formula of Karras grids, from which every such grid in losses and samplers is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, overload

import torch as th
from torch import Tensor
from torch.types import Device

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
VE_LEVELS = (0.02, 100.0)                                           # of the published VE networks


@overload
def karras_sigma(
    position: Tensor, sigma_min: float = ..., sigma_max: float = ..., rho: float = ...
) -> Tensor: ...


@overload
def karras_sigma(
    position: float, sigma_min: float = ..., sigma_max: float = ..., rho: float = ...
) -> float: ...


def karras_sigma(
    position: float | Tensor, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> float | Tensor:
    """The noise level at a position of the grid, 0 for sigma_max and 1 for sigma_min: EDM, equation 5.

    sigma^(1/rho) is linear in the position, so a larger rho puts more of the levels near sigma_min.

    :param position: in [0, 1]; a tensor of any shape is computed in float64 and returned in its own dtype.
    :raises ValueError: unless 0 < sigma_min <= sigma_max and rho > 0.
    """
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(f"noise levels need 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}; the usual value is {RHO:g}")
    if isinstance(position, Tensor):
        return _between(sigma_max, sigma_min, position.double(), rho).to(position.dtype)
    return _between(sigma_max, sigma_min, position, rho)


def _between(start: Any, end: Any, share: Any, rho: float) -> Any:
    root, root_end = start ** (1 / rho), end ** (1 / rho)
    return (root + share * (root_end - root)) ** rho


def karras_grid(
    n: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
    device: Device = "cpu",
    dtype: th.dtype = th.float64,
) -> Tensor:
    """n noise levels, falling from exactly sigma_max to exactly sigma_min: [n]. A grid of one is [sigma_max].

    :raises ValueError: if n < 1, and for the reasons of `karras_sigma`.
    """
    if n < 1:
        raise ValueError(f"a grid needs at least 1 noise level, got n={n}")
    positions = th.arange(n, dtype=th.float64, device=device) / max(n - 1, 1)
    grid = karras_sigma(positions, sigma_min, sigma_max, rho)
    # The powers round; the ends must not, because a consistency model is the identity at sigma_min and there alone.
    grid[-1] = sigma_min
    grid[0] = sigma_max
    return grid.to(dtype)


def karras_between(start: Tensor, end: Tensor, n: int, rho: float = RHO) -> Tensor:
    """A Karras grid of n levels between each pair of ends, start >= end > 0, [N] each: [n,N], with exact ends.

    No level is above the one before it, however close the two ends are.
    """
    share = th.arange(1, n - 1, dtype=th.float64, device=start.device)[:, None] / (n - 1)
    between = _between(start.double(), end.double(), share, rho).to(start.dtype).clamp(end, start)
    between = between.cummin(0).values if n > 2 else between        # the powers round
    return th.cat([start[None], between, end[None]])


def karras_earlier(
    sigma: Tensor, k: int, n: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> tuple[Tensor, Tensor]:
    """The levels k steps of an n-level grid closer to the image, [N], and whether that is above sigma_min, bool [N].

    Where it is not, the level is sigma_min. For k = 0 it is always sigma itself.
    """
    if k == 0:
        return sigma, th.ones_like(sigma, dtype=th.bool)
    step = (sigma_max ** (1 / rho) - sigma_min ** (1 / rho)) / (n - 1)
    root = sigma.double() ** (1 / rho) - k * step
    is_there = root >= sigma_min ** (1 / rho)
    return th.where(is_there, root.clamp(min=0) ** rho, sigma_min).to(sigma.dtype), is_there


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = RHO, device: Device = "cpu"
) -> Tensor:
    """The n levels of `karras_grid` in float32, and then 0: [n+1]."""
    return append_zero(karras_grid(n, sigma_min, sigma_max, rho, device, th.float32))


def geometric_grid(n: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Tensor:
    """n noise levels in constant ratio, falling from sigma_max to sigma_min, float64: [n]."""
    return sigma_max * (sigma_min / sigma_max) ** (th.arange(n, dtype=th.float64) / max(n - 1, 1))


def append_zero(x: Tensor) -> Tensor:
    """The levels [n] followed by 0, [n+1], for solvers that end at the data."""
    return th.cat([x, x.new_zeros(1)])


@dataclass(frozen=True)
class VPProcess:
    """sigma(t) of the variance-preserving process, 1 + sigma^2 = exp(beta_d t^2 / 2 + beta_min t).

    Song et al. 2021 (arXiv 2011.13456), equation 32, with beta(t) = beta_min + beta_d t. A float gives a float; a
    tensor gives a tensor of its shape and dtype.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    ends: tuple[float, float] = (1e-5, 1.0)                         # times between which networks are trained

    @overload
    def sigma(self, t: Tensor) -> Tensor: ...

    @overload
    def sigma(self, t: float) -> float: ...

    def sigma(self, t: float | Tensor) -> float | Tensor:
        """The noise level at the time t."""
        exponent = self.beta_d / 2 * t**2 + self.beta_min * t
        return exponent.expm1().sqrt() if isinstance(exponent, Tensor) else math.sqrt(math.expm1(exponent))

    @overload
    def time(self, sigma: Tensor) -> Tensor: ...

    @overload
    def time(self, sigma: float) -> float: ...

    def time(self, sigma: float | Tensor) -> float | Tensor:
        """The inverse of `sigma`."""
        log = (sigma**2).log1p() if isinstance(sigma, Tensor) else math.log1p(sigma**2)
        return ((self.beta_min**2 + 2 * self.beta_d * log) ** 0.5 - self.beta_min) / self.beta_d


VP = VPProcess()


@cache
def iddpm_levels(steps: int = 1000, c1: float = 0.001, c2: float = 0.008) -> Tensor:
    """The noise levels u_0 > u_1 > ... of the cosine process of Nichol and Dhariwal 2021: [steps] float64.

    Karras et al. 2022, table 1, iDDPM: alpha_bar(j) = sin^2(pi / 2 j / (steps (1 + c2))), where no step removes more
    than the share 1 - c1 of the signal.
    """
    def alpha_bar(j: int) -> float:
        return math.sin(math.pi / 2 * j / (steps * (1 + c2))) ** 2

    levels = [0.0]
    for j in range(steps, 0, -1):
        kept = max(alpha_bar(j - 1) / alpha_bar(j), c1)
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / kept - 1))
    return th.tensor(levels[:0:-1], dtype=th.float64)
