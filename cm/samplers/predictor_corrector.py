"""Predictor-corrector sampling: Song et al. 2021 (arXiv 2011.13456), algorithms 2 to 5.

The predictor is reverse diffusion: the reverse SDE discretised as its forward process is. The corrector is Langevin
dynamics at the new noise level, with steps of a size that keeps the ratio of its two terms at `snr`. The paper
measures that ratio over a batch; here every sample has its own, so that an image does not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.diffusion.schedules import append_zero, geometric_grid
from cm.errors import UserError
from cm.registry import lookup
from cm.samplers.ddim import timestep_grid
from cm.samplers.euler import Euler
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource

PROCESSES = ("ve", "vp")


@dataclass(frozen=True)
class PredictorCorrector(Euler):
    """1 + corrector_steps evaluations per step, one in the last. The order is the predictor's strong one.

    :param pc_sde: the process whose noise levels and steps are used: `ve`, a geometric grid, or `vp`, evenly spaced
        timesteps of DDPM, where all is done in the coordinates x / sqrt(1 + sigma^2).
    :param snr: signal-to-noise ratio of the corrector; its variance comes out 1 / (1 - snr^2) times too large.
    :param corrector_steps: how many of them follow each step of the predictor.
    """

    pc_sde: str = "ve"
    snr: float = 0.16
    corrector_steps: int = 1

    accepts_churn: ClassVar[bool] = False
    uses_rho: ClassVar[bool] = False

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(PROCESSES), self.pc_sde, "pc_sde")
        if not 0 < self.snr < 1:
            raise UserError(f"snr={self.snr:g} must lie between 0 and 1; the usual value is 0.16")
        if self.corrector_steps < 0:
            raise UserError(f"corrector_steps={self.corrector_steps} must not be negative")

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        make = geometric_grid if self.pc_sde == "ve" else timestep_grid
        return append_zero(make(steps, sigma_min, sigma_max))

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        predict = self.predict_ve if self.pc_sde == "ve" else self.predict_vp
        x = predict(score(D, x, sigma), x, sigma, sigma_next, rng)
        for _ in range(self.corrector_steps):
            x = self.correct(D, x, sigma, sigma_next, rng)
        return x

    def predict_ve(self, s: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        beta = append_dims(sigma**2 - sigma_next**2, x.ndim)
        return x + beta * s + beta.sqrt() * rng.randn_like(x)

    def predict_vp(self, s: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """In y = x / r, r = sqrt(1 + sigma^2): y' = (2 - sqrt(1 - beta)) y + beta score_y + sqrt(beta) z."""
        r, r_next = (append_dims((1 + level**2).sqrt(), x.ndim) for level in (sigma, sigma_next))
        keep = r_next / r                                           # sqrt(1 - beta)
        beta = 1 - keep**2
        y = (2 - keep) * x / r + beta * s * r + beta.sqrt() * rng.randn_like(x)
        return r_next * y

    def correct(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """One step of Langevin dynamics at sigma_next; it is the same in x as in y, but for the factor 1 - beta."""
        s, z = score(D, x, sigma_next), rng.randn_like(x)
        size = 2 * (self.snr * norm(z) / norm(s)) ** 2              # [N]
        if self.pc_sde == "vp":
            size = size * (1 + sigma_next**2) / (1 + sigma**2)
        size = append_dims(size, x.ndim)
        return x + size * s + (2 * size).sqrt() * z


def score(D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    return (D(x, sigma) - x) / append_dims(sigma, x.ndim) ** 2


def norm(x: Tensor) -> Tensor:
    """[N,...] -> [N]"""
    return th.linalg.vector_norm(x.flatten(1), dim=1)
