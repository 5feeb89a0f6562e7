"""Consistent diffusion models: Daras et al. 2023 (arXiv 2302.09057), equation 5 and section 3.

The exact denoiser is a martingale of the backward process: E[D(x_s', s') | x_s] = D(x_s, s) for s' < s. A regulariser
penalises the square of the difference.

Shapes: N batch, C channels, H and W height and width. Times are noise levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.diffusion.schedules import karras_between
from cm.objectives.edm import EDM, error_terms
from cm.registry import lookup
from cm.tensors import append_dims, mean_flat
from cm.types import Batch, Denoiser, LossTerms, Networks, NoiseSource

LONGEST = 0.05                                                      # s - s' is uniform in 0..LONGEST
LOWEST = 0.002                                                      # lowest s'


@dataclass
class CDM(EDM):
    """EDM's loss + martingale_lambda mean((D(x', s') - D(x, s)) (D(x'', s') - D(x, s))).

    x' and x'' are the ends of two independent walks along the backward SDE from x at level s, without gradient. The
    square of one walk would also penalise the variance of its end. The product is an unbiased estimate of the squared
    difference of expectations, so individual values may be negative; it is not weighted by noise level.

    :param martingale_steps: noise levels of a walk, on a Karras grid including both ends; a walk evaluates D once less.
    :param martingale_sde: the variable of the walk's Euler-Maruyama steps, see BACKWARD.
    """

    options: ClassVar[tuple[str, ...]] = ("martingale_lambda", "martingale_steps", "martingale_sde")

    martingale_lambda: float = 10.0
    martingale_steps: int = 6
    martingale_sde: str = "t"

    def terms(self, nets: Networks, batch: Batch, noise: Tensor, sigma: Tensor, rng: NoiseSource) -> LossTerms:
        x0, D = batch.images, partial(nets.online, **batch.cond)
        x = x0 + noise * append_dims(sigma, x0.ndim)
        denoised = D(x, sigma)
        terms = error_terms(denoised, x0, sigma, self.weight)
        martingale = self.violation(D, x, sigma, denoised, rng)
        terms.loss = terms.loss + self.martingale_lambda * martingale
        return LossTerms(terms.loss, sigma, {**terms.logs, "martingale": martingale})

    def violation(self, D: Denoiser, x: Tensor, sigma: Tensor, denoised: Tensor, rng: NoiseSource) -> Tensor:
        """An unbiased estimate of mean(E[D(x', s')] - D(x, s))^2: [N], where denoised is D(x, s)."""
        length = rng.rand(len(x), device=x.device) * LONGEST
        end = th.minimum(sigma, (sigma - length).clamp(min=LOWEST))     # a level below LOWEST stays where it is
        levels = karras_between(sigma, end, self.martingale_steps)
        walks = [self.walk(D, x, levels, denoised, rng) for _ in range(2)]
        first, second = (D(walk, end) - denoised for walk in walks)
        return mean_flat(first * second)

    @th.no_grad()
    def walk(self, D: Denoiser, x: Tensor, levels: Tensor, denoised: Tensor, rng: NoiseSource) -> Tensor:
        """The end of one walk along levels [martingale_steps,N]; denoised is D at its start, which both walks share."""
        coefficients = lookup(BACKWARD, self.martingale_sde, "martingale_sde")
        for i, (t, t2) in enumerate(zip(levels, levels[1:])):
            toward, variance = (append_dims(c, x.ndim) for c in coefficients(t, t2))
            target = denoised if i == 0 else D(x, t)
            x = x + toward * (target - x) + variance.sqrt() * rng.randn_like(x)
        return x


def in_t(t: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
    """Euler-Maruyama in the noise level, as published: biased by its own discretisation even for the exact D."""
    return 2 * (t - t2) / t, 2 * t * (t - t2)


def in_u(t: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
    """Euler-Maruyama in u = t^2, where the noise is constant: without bias on Gaussian data."""
    h = (t - t2) * (t + t2)
    return h / t**2, h


# (t, t2) -> the fraction of the way to D(x, t) that a step goes, and the variance of its noise, [N] each.
BACKWARD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {"t": in_t, "u": in_u}
