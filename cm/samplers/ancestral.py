"""Ancestral sampling of the variance-exploding process: Song et al. 2021 (arXiv 2011.13456), appendix F."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cm.samplers.base import Sampler, lerp_to
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Draws x_next from p(x_next | x, x0 = D(x, sigma)) in each step: an exponential integrator of the reverse SDE.

    The mean is an Euler step down to sigma_next^2 / sigma; noise then raises the level to sigma_next. `order` is the
    strong order.
    """

    accepts_churn: ClassVar[bool] = False

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """The mean of p(x_next | x, D(x, sigma)), plus its noise."""
        ratio = sigma_next / sigma
        noise_up = sigma_next * (1 - ratio**2).sqrt()
        mean = lerp_to(D(x, sigma), x, ratio**2)
        return mean + rng.randn_like(x) * append_dims(noise_up, x.ndim)
