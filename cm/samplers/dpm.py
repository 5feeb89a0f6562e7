"""A midpoint method in the spirit of DPM-Solver-2: Lu et al. 2022 (arXiv 2206.00927); `integrate` adds the churn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.samplers.base import Sampler, lerp_to
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource


@dataclass(frozen=True)
class DPM(Sampler):
    """Uses the slope at the midpoint in the cube root of sigma: two evaluations in every step, including the last."""

    order: ClassVar[float] = 2

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource | None) -> Tensor:
        """An Euler step to the middle level, then a complete step along the slope there."""
        sigma_mid = ((sigma ** (1 / 3) + sigma_next ** (1 / 3)) / 2) ** 3
        x_mid = lerp_to(D(x, sigma), x, sigma_mid / sigma)
        slope = (x_mid - D(x_mid, sigma_mid)) / append_dims(sigma_mid, x.ndim)
        return x + append_dims(sigma_next - sigma, x.ndim) * slope

    def last_step(self, D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        """The same step to sigma = 0, where the middle level is sigma / 8."""
        return self.step(D, x, sigma, th.zeros_like(sigma), None)
