"""Guidance by a weaker denoiser for any sampler, and for a teacher: classifier-free guidance and autoguidance.

D_g = D_bad + w (D - D_bad). In classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, equation 6 with
w = 1 + their w) D_bad is the network itself without its class; in autoguidance (Karras et al. 2024, arXiv 2406.02507,
equation 5) it is a smaller or less trained network of the same task. The interval of noise levels is that of
Kynkäänniemi et al. 2024 (arXiv 2404.07724).

The two denoisers are evaluated one after the other, not as one batch of twice the size: D then has the same bits as
without guidance, the memory does not grow, and a compiled network has only one input shape.

Shapes: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import Tensor, nn

from cm.diffusion.denoiser import Diffusion
from cm.diffusion.preconditioning import Precond
from cm.samplers.integrate import CountingDenoiser
from cm.types import Denoiser


@dataclass(frozen=True)
class Guidance:
    """The guide of a denoiser, its strength, and the noise levels at which it acts.

    :param worse: D -> D_bad; `without_class` for classifier-free guidance, a constant function for autoguidance.
    :param scale: w; at 1 there is no guidance, and D_bad is never evaluated.
    :param lowest, highest: the guide acts where lowest < sigma <= highest, and is evaluated nowhere else.
    """

    worse: Callable[[Denoiser], Denoiser]
    scale: float
    lowest: float = 0.0
    highest: float = math.inf

    def covers(self, sigma: Tensor) -> Tensor | None:
        """Where the guide acts, bool [N]; None means everywhere and needs no device synchronisation."""
        if self.lowest <= 0 and self.highest == math.inf:
            return None
        return (sigma > self.lowest) & (sigma <= self.highest)


def without_class(D: Denoiser, null_class: int) -> Denoiser:
    """D with the label for no class, for any classes y [N]."""

    def denoise(x: Tensor, sigma: Tensor, *, y: Tensor, **cond: Any) -> Tensor:
        return D(x, sigma, y=th.full_like(y, null_class), **cond)

    return denoise


class NetworkGuidedDenoiser:
    """D_g of a denoiser D; `plain` is D itself.

    In a batch with several noise levels, the guide is evaluated only for the samples where it acts. A call of the guide
    always counts as one evaluation.
    """

    def __init__(self, D: Denoiser, guidance: Guidance):
        self.plain, self.guidance = D, guidance
        self.worse = CountingDenoiser(guidance.worse(D))

    @property
    def extra_calls(self) -> int:
        """Evaluations of the guide so far, which `CountingDenoiser` adds to those of D."""
        return self.worse.calls

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        denoised = self.plain(x, sigma, **cond)
        if self.guidance.scale == 1:
            return denoised
        covered = self.guidance.covers(sigma)
        count = len(x) if covered is None else int(covered.sum())
        if count == 0:
            return denoised
        if covered is None or count == len(x):
            return denoised + self._push(denoised, x, sigma, cond)
        rows = covered.nonzero()[:, 0]
        some = {name: value[rows] for name, value in cond.items()}
        return denoised.index_add(0, rows, self._push(denoised[rows], x[rows], sigma[rows], some))

    def _push(self, denoised: Tensor, x: Tensor, sigma: Tensor, cond: dict[str, Any]) -> Tensor:
        """D_g - D = (w - 1) (D - D_bad)."""
        return (self.guidance.scale - 1) * (denoised - self.worse(x, sigma, **cond))


@dataclass(frozen=True)
class NetworkGuidedDiffusion:
    """The part of a `Diffusion` that sampling and distillation need, guided by a weaker denoiser."""

    diffusion: Diffusion
    guidance: Guidance

    @property
    def scaling(self) -> Precond:
        """The scalings around the network, those of `diffusion`."""
        return self.diffusion.scaling

    def bind(self, model: nn.Module) -> Denoiser:
        """The guided denoiser of a network."""
        return NetworkGuidedDenoiser(self.diffusion.bind(model), self.guidance)


def unguided(D: Denoiser) -> Denoiser:
    """The denoiser without its guide, if it has one."""
    return D.plain if isinstance(D, NetworkGuidedDenoiser) else D
