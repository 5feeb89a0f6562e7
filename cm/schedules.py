"""Grids of noise levels.

Source: Karras et al. 2022 (EDM, arXiv 2206.00364), equation 5. There is one formula, `karras_sigma`; every grid of
this package, in losses and in samplers, is made of it.
"""

from __future__ import annotations

from typing import Any

import torch as th
from torch import Tensor

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def karras_sigma(
    position: float | Tensor, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> float | Tensor:
    """The noise level at a position of the grid, 0 for sigma_max and 1 for sigma_min.

    sigma^(1/rho) moves in a straight line, so a larger rho crowds the levels near sigma_min.

    :param position: in [0, 1]; a tensor of any shape is computed in float64 and returned in its own dtype.
    :raises ValueError: unless 0 < sigma_min <= sigma_max and rho > 0.
    """
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(f"noise levels need 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}; the usual value is {RHO:g}")
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    if isinstance(position, Tensor):
        return (start + position.double() * (end - start)).pow(rho).to(position.dtype)
    return (start + position * (end - start)) ** rho


def karras_grid(
    n: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
    device: Any = "cpu",
    dtype: th.dtype = th.float64,
) -> Tensor:
    """n noise levels, falling from exactly sigma_max to exactly sigma_min: [n]. A grid of one is [sigma_max].

    :raises ValueError: if n < 1, and as `karras_sigma`.
    """
    if n < 1:
        raise ValueError(f"a grid needs at least 1 noise level, got n={n}")
    positions = th.arange(n, dtype=th.float64, device=device) / max(n - 1, 1)
    grid = karras_sigma(positions, sigma_min, sigma_max, rho)
    # The powers round; the ends must not, because a consistency model is the identity at sigma_min and there alone.
    grid[-1] = sigma_min
    grid[0] = sigma_max
    return grid.to(dtype)


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = RHO, device: Any = "cpu"
) -> Tensor:
    """The n levels of `karras_grid` in float32, and then 0: [n+1]."""
    return append_zero(karras_grid(n, sigma_min, sigma_max, rho, device, th.float32))


def append_zero(sigmas: Tensor) -> Tensor:
    """[n] -> [n+1], for solvers that go all the way to the data."""
    return th.cat([sigmas, sigmas.new_zeros(1)])
