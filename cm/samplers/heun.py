"""Heun's method: Karras et al. 2022 (EDM, arXiv 2206.00364), algorithm 2; `integrate` adds the churn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cm.samplers.base import Sampler
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource


@dataclass(frozen=True)
class Heun(Sampler):
    """The mean of the slopes at both ends: two evaluations per step, one in the last."""

    order: ClassVar[float] = 2

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource | None) -> Tensor:
        """Lines 7 to 11 of the algorithm, the paper's t being sigma; uses no random numbers."""
        t, t_next = append_dims(sigma, x.ndim), append_dims(sigma_next, x.ndim)
        d = (x - D(x, sigma)) / t
        x_euler = x + (t_next - t) * d
        d_next = (x_euler - D(x_euler, sigma_next)) / t_next
        return x + (t_next - t) / 2 * (d + d_next)
