"""Euler's method for the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, and what all its solvers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.diffusion.schedules import append_zero, karras_grid
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource


@dataclass(frozen=True)
class Euler:
    """One evaluation per step."""

    order: ClassVar[float] = 1
    accepts_churn: ClassVar[bool] = True
    uses_rho: ClassVar[bool] = True                                 # whether the grid is one of Karras's
    uses_jvp: ClassVar[bool] = False                                # whether the denoiser is differentiated, forward

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """The noise levels of `steps` steps, float64: a Karras grid, then 0."""
        return append_zero(karras_grid(steps, sigma_min, sigma_max, rho))

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource | None) -> Tensor:
        return lerp_to(D(x, sigma), x, sigma_next / sigma)

    def last_step(self, D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        """All the way along the slope at sigma is the denoised image itself."""
        return D(x, sigma)


def lerp_to(denoised: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """The point that keeps a share [N] of the way from `denoised` to x: Euler's step when keep = sigma_next / sigma."""
    return th.lerp(denoised, x, append_dims(keep, x.ndim))
