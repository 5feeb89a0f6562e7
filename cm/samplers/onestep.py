"""One evaluation, from pure noise to an image: Song et al. 2023 (Consistency Models, arXiv 2303.01469), section 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.samplers.base import Sampler, lerp_to
from cm.types import Denoiser, NoiseSource, Result


@dataclass(frozen=True)
class OneStep(Sampler):
    """f(x_T, sigma_max), for any number of steps: the last step of the base class."""

    accepts_churn: ClassVar[bool] = False
    uses_rho: ClassVar[bool] = False
    uses_steps: ClassVar[bool] = False
    networks: ClassVar[tuple[Result, ...]] = ("consistency_function",)

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """sigma_max, then 0: float64 [2]."""
        return th.tensor([sigma_max, 0.0], dtype=th.float64)

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource | None) -> Tensor:
        """Euler's step. The sampler's own grid has no step that ends above 0, but the levels of an edit may."""
        return lerp_to(D(x, sigma), x, sigma_next / sigma)
