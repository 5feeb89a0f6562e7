"""The sampler of a progressively distilled model: Salimans and Ho 2022 (arXiv 2202.00512)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cm.diffusion.schedules import karras_grid
from cm.samplers.euler import Euler


@dataclass(frozen=True)
class ProgDist(Euler):
    """Euler steps on the grid that the student was trained on: `steps` of them, down to sigma_min, not to 0."""

    accepts_churn: ClassVar[bool] = False

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        return karras_grid(steps + 1, sigma_min, sigma_max, rho)
