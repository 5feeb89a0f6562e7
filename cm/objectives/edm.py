"""Denoising: Karras et al. 2022 (EDM, arXiv 2206.00364), equation 2 with the weights of table 1.

Shapes: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cm.diffusion.denoiser import Diffusion
from cm.diffusion.noise_sampling import (
    LogNormalSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    create_named_schedule_sampler,
)
from cm.objectives.base import Objective
from cm.tensors import append_dims, mean_flat
from cm.types import Batch, Denoiser, LossTerms, Networks, NoiseSource


@dataclass
class EDM(Objective):
    """weight(sigma) mean(D(x0 + sigma z, sigma) - x0)^2.

    The other denoising objectives override `terms`; their `options` are fields of the subclass.

    :param weight: the loss weight at noise levels, [N] -> [N].
    :param schedule_sampler: the distribution of the noise levels.
    """

    weight: Callable[[Tensor], Tensor]
    schedule_sampler: ScheduleSampler = field(default_factory=LogNormalSampler)

    @classmethod
    def from_flags(cls, diffusion: Diffusion, values: Mapping[str, Any]) -> EDM:
        noise_distribution = create_named_schedule_sampler(values["schedule_sampler"], diffusion)
        return cls.of(diffusion, noise_distribution, {name: values[name] for name in cls.options})

    @classmethod
    def of(cls, diffusion: Diffusion, noise_distribution: ScheduleSampler, options: Mapping[str, Any]) -> EDM:
        """The objective with the loss weights of a diffusion, noise levels from a distribution, and these options."""
        return cls(diffusion.weight, noise_distribution, **options)

    def __call__(self, nets: Networks, batch: Batch, step: int, rng: NoiseSource) -> LossTerms:
        x0 = batch.images
        sigma, importance, _ = self.schedule_sampler.draw(rng, len(x0), x0.device)
        terms = self.terms(nets, batch, rng.randn_like(x0), sigma.to(x0.dtype), rng)
        terms.loss = terms.loss * importance
        return terms

    def terms(self, nets: Networks, batch: Batch, noise: Tensor, sigma: Tensor, rng: NoiseSource) -> LossTerms:
        """The loss for given noise [N,C,H,W] at given levels [N]; any other random numbers come from rng."""
        return edm_terms(nets.online, batch.images, noise, sigma, self.weight, batch.cond)

    @property
    def history(self) -> LossSecondMomentResampler | None:
        """The noise distribution, if it learns from the losses of all ranks."""
        return self.schedule_sampler if isinstance(self.schedule_sampler, LossSecondMomentResampler) else None


def edm_terms(
    D: Denoiser, x0: Tensor, noise: Tensor, sigma: Tensor, weight: Callable[[Tensor], Tensor], cond: dict[str, Any]
) -> LossTerms:
    """The loss for given noise [N,C,H,W] at given levels [N]; it logs the values of `error_terms`."""
    x = x0 + noise * append_dims(sigma, x0.ndim)
    return error_terms(D(x, sigma, **cond), x0, sigma, weight)


def error_terms(denoised: Tensor, target: Tensor, sigma: Tensor, weight: Callable[[Tensor], Tensor]) -> LossTerms:
    """The loss of denoised images [N,C,H,W]; logs the unweighted `xs_mse` and the weighted `mse`, [N] each."""
    xs_mse = mean_flat((denoised - target).square())
    mse = weight(sigma) * xs_mse
    return LossTerms(mse, sigma, {"xs_mse": xs_mse, "mse": mse})
