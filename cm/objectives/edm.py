"""Denoising: Karras et al. 2022 (EDM, arXiv 2206.00364), equation 2 with the weights of table 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cm.interfaces import Batch, Denoiser, Nets, NoiseSource, Terms
from cm.nn import append_dims, mean_flat
from cm.resample import LogNormalSampler, LossSecondMomentResampler, ScheduleSampler


@dataclass
class EDM:
    """weight(sigma) mean(D(x0 + sigma z, sigma) - x0)^2.

    :param weight: the loss weight at noise levels, [N] -> [N].
    :param schedule_sampler: the law of the noise levels.
    """

    weight: Callable[[Tensor], Tensor]
    schedule_sampler: ScheduleSampler = field(default_factory=LogNormalSampler)

    def __call__(self, nets: Nets, batch: Batch, step: int, rng: NoiseSource) -> Terms:
        x0 = batch.images
        sigma, importance, _ = self.schedule_sampler.draw(rng, len(x0), x0.device)
        terms = edm_terms(nets.online, x0, rng.randn_like(x0), sigma.to(x0.dtype), self.weight, batch.cond)
        terms.loss = terms.loss * importance
        return terms

    @property
    def memory(self) -> LossSecondMomentResampler | None:
        """The law, if it learns from the losses of all ranks, which the loop hands to it."""
        return self.schedule_sampler if isinstance(self.schedule_sampler, LossSecondMomentResampler) else None

    def after_step(self, nets: Nets, step: int) -> bool:
        return False


def edm_terms(
    D: Denoiser, x0: Tensor, noise: Tensor, sigma: Tensor, weight: Callable[[Tensor], Tensor], cond: dict[str, Any]
) -> Terms:
    """The loss of given noise at given levels; logs the unweighted `xs_mse` and the weighted `mse`, [N] each."""
    x = x0 + noise * append_dims(sigma, x0.ndim)
    xs_mse = mean_flat((D(x, sigma, **cond) - x0).square())
    mse = weight(sigma) * xs_mse
    return Terms(mse, sigma, {"xs_mse": xs_mse, "mse": mse})
