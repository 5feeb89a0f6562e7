"""Euler's method for the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma.

Source: Karras et al. 2022 (EDM, arXiv 2206.00364), equation 3 with sigma(t) = t and s(t) = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cm.samplers.base import Sampler, lerp_to
from cm.types import Denoiser, NoiseSource, Result


@dataclass(frozen=True)
class Euler(Sampler):
    """One evaluation per step."""

    networks: ClassVar[tuple[Result, ...]] = ("denoiser", "progressive_student", "flow_map")    # Euler steps fit

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource | None) -> Tensor:
        """x' = D + (sigma' / sigma) (x - D); uses no random numbers."""
        return lerp_to(D(x, sigma), x, sigma_next / sigma)
