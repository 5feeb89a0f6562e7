"""The sampler of flow maps, in any number of steps: Geng et al. 2025 (MeanFlow, arXiv 2505.13447), algorithm 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.diffusion import linear_clock
from cm.samplers.base import Sampler, lerp_to
from cm.types import Denoiser, NoiseSource, Result


@dataclass(frozen=True)
class FlowMapSampler(Sampler):
    """Euler steps with a denoiser that is conditioned on their length; exact for an exact flow map with any step count.

    The levels are evenly spaced on the linear clock, from sigma_max to 0.
    """

    accepts_churn: ClassVar[bool] = False
    uses_rho: ClassVar[bool] = False
    networks: ClassVar[tuple[Result, ...]] = ("flow_map",)

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """Levels at evenly spaced times, down to 0: float64 [steps+1]."""
        first = sigma_max / (1 + sigma_max)
        levels = linear_clock.level(first * th.arange(steps, -1, -1, dtype=th.float64) / steps)
        levels[0] = sigma_max                                       # which the division rounds
        return levels

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource | None) -> Tensor:
        """From sigma to sigma_next in one evaluation."""
        gap = linear_clock.time(sigma) - linear_clock.time(sigma_next)
        return lerp_to(D(x, sigma, gap=gap), x, sigma_next / sigma)

    def last_step(self, D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        """The step to the image, in one evaluation."""
        return D(x, sigma, gap=linear_clock.time(sigma))
