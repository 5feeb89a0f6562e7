"""Predictor-corrector sampling: Song et al. 2021 (arXiv 2011.13456), algorithms 2 to 5.

The predictor is reverse diffusion: it discretises the reverse SDE in the same way as the forward process. The corrector
is Langevin dynamics at the new noise level, with a step size that keeps the ratio of its two terms at `snr`. The paper
computes this ratio over a batch; here every sample has its own, so that an image does not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.diffusion.schedules import append_zero, geometric_grid
from cm.errors import UserError
from cm.registry import lookup
from cm.samplers.base import Sampler
from cm.samplers.ddim import timestep_grid
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource

PROCESSES = ("ve", "vp")


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """1 + corrector_steps evaluations per step, one in the last. `order` is the strong order of the predictor.

    :param pc_sde: the process whose noise levels and steps are used: `ve`, a geometric grid, or `vp`, evenly spaced
        timesteps of DDPM, where the steps are taken in the coordinates x / sqrt(1 + sigma^2).
    :param snr: signal-to-noise ratio of the corrector; its variance is 1 / (1 - snr^2) times too large.
    :param corrector_steps: number of corrector steps after each predictor step.
    :raises UserError: for an unknown pc_sde, snr outside (0, 1), or a negative number of corrector steps.
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
        """The levels of the process `pc_sde`, then 0: float64 [steps+1]."""
        make = geometric_grid if self.pc_sde == "ve" else timestep_grid
        return append_zero(make(steps, sigma_min, sigma_max))

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """One step of the predictor, then `corrector_steps` of the corrector at the new level."""
        predict = self._predict_ve if self.pc_sde == "ve" else self._predict_vp
        x = predict(_score(D, x, sigma), x, sigma, sigma_next, rng)
        for _ in range(self.corrector_steps):
            x = self.correct(D, x, sigma, sigma_next, rng)
        return x

    def _predict_ve(self, s: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """x' = x + beta score + sqrt(beta) z, where beta = sigma^2 - sigma'^2."""
        beta = append_dims(sigma**2 - sigma_next**2, x.ndim)
        return x + beta * s + beta.sqrt() * rng.randn_like(x)

    def _predict_vp(self, s: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """In y = x / r, r = sqrt(1 + sigma^2): y' = (2 - sqrt(1 - beta)) y + beta score_y + sqrt(beta) z."""
        r, r_next = (append_dims((1 + level**2).sqrt(), x.ndim) for level in (sigma, sigma_next))
        keep = r_next / r                                           # sqrt(1 - beta)
        beta = 1 - keep**2
        y = (2 - keep) * x / r + beta * s * r + beta.sqrt() * rng.randn_like(x)
        return r_next * y

    def correct(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """One step of Langevin dynamics at sigma_next; it is the same in x as in y except for the factor 1 - beta."""
        s, z = _score(D, x, sigma_next), rng.randn_like(x)
        size = 2 * (self.snr * _norm(z) / _norm(s)) ** 2              # [N]
        if self.pc_sde == "vp":
            size = size * (1 + sigma_next**2) / (1 + sigma**2)
        size = append_dims(size, x.ndim)
        return x + size * s + (2 * size).sqrt() * z


def _score(D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """grad log p(x; sigma) = (D(x, sigma) - x) / sigma^2, [N,C,H,W]: EDM, equation 3."""
    return (D(x, sigma) - x) / append_dims(sigma, x.ndim) ** 2


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample: [N,...] -> [N]."""
    return th.linalg.vector_norm(x.flatten(1), dim=1)
