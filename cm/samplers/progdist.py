"""The sampler of a progressively distilled model: Salimans and Ho 2022 (arXiv 2202.00512)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cm.diffusion.schedules import karras_grid
from cm.samplers.base import Sampler, lerp_to
from cm.types import Denoiser, NoiseSource, Result


@dataclass(frozen=True)
class ProgDist(Sampler):
    """Euler steps on the grid that the student was trained on: `steps` of them, down to sigma_min, not to 0."""

    accepts_churn: ClassVar[bool] = False
    networks: ClassVar[tuple[Result, ...]] = ("progressive_student",)

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """A Karras grid of float64 [steps+1] that ends at sigma_min."""
        return karras_grid(steps + 1, sigma_min, sigma_max, rho)

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource | None) -> Tensor:
        """Euler's step, which is DDIM's (Salimans and Ho 2022, appendix B)."""
        return lerp_to(D(x, sigma), x, sigma_next / sigma)
