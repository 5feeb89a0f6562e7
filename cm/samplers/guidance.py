"""Classifier guidance: Dhariwal and Nichol 2021 (arXiv 2105.05233), section 4, for any sampler.

The score of p(x | y) p(y | x)^(s-1) is that of x plus s grad log p(y | x), and D = x + sigma^2 score. So a guided
denoiser is D + s sigma^2 grad log p(y | x_sigma, sigma), where the classifier has learnt from noisy images.

Shapes: N batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import Tensor, nn

from cm.diffusion.denoiser import Diffusion
from cm.diffusion.preconditioning import Precond
from cm.tensors import append_dims
from cm.types import Denoiser

LogProbabilities = Callable[[Tensor, Tensor], Tensor]               # x [N,C,H,W], sigma [N] -> log p(y | x) [N,K]


def guided(D: Denoiser, classify: LogProbabilities, scale: float, tell_class: bool = True) -> Denoiser:
    """D with the pull of a classifier towards the classes y [N].

    :param classify: logits will do: they are normalised here.
    :param tell_class: whether D takes y, too.
    """

    def denoise(x: Tensor, sigma: Tensor, *, y: Tensor, **cond: Any) -> Tensor:
        def log_likelihood(z: Tensor) -> Tensor:
            return classify(z, sigma).log_softmax(1).gather(1, y[:, None]).sum()

        # torch.func and not autograd: it differentiates in inference mode and inside a forward-mode pass.
        pull = th.func.grad(log_likelihood)(x)
        own = {"y": y} if tell_class else {}
        return D(x, sigma, **own, **cond) + append_dims(scale * sigma**2, x.ndim) * pull

    return denoise


@dataclass(frozen=True)
class GuidedDiffusion:
    """A `Diffusion` as far as sampling needs one, guided by a classifier."""

    diffusion: Diffusion
    classify: LogProbabilities
    scale: float
    tell_class: bool                                                # whether the network takes classes itself

    @property
    def scaling(self) -> Precond:
        return self.diffusion.scaling

    def bind(self, model: nn.Module) -> Denoiser:
        return guided(self.diffusion.bind(model), self.classify, self.scale, self.tell_class)
