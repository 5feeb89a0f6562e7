"""Classifier guidance for any sampler: Dhariwal and Nichol 2021 (arXiv 2105.05233), section 4.

The score of p(x | y) p(y | x)^(s-1) is that of x plus s grad log p(y | x), and D = x + sigma^2 score. So a guided
denoiser is D + s sigma^2 grad log p(y | x, sigma), where the classifier was trained on noisy images.

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


def guided(D: Denoiser, classify: LogProbabilities, scale: float, class_cond: bool = True) -> Denoiser:
    """D plus the gradient of a classifier towards the classes y [N].

    :param classify: may return logits, which are normalised here.
    :param scale: the paper's s, the strength of the guidance.
    :param class_cond: whether D is conditioned on y as well.
    """

    def denoise(x: Tensor, sigma: Tensor, *, y: Tensor, **cond: Any) -> Tensor:
        def log_likelihood(z: Tensor) -> Tensor:
            return classify(z, sigma).log_softmax(1).gather(1, y[:, None]).sum()

        # torch.func and not autograd: it differentiates in inference mode and inside a forward-mode pass.
        pull = th.func.grad(log_likelihood)(x)
        own = {"y": y} if class_cond else {}
        return D(x, sigma, **own, **cond) + append_dims(scale * sigma**2, x.ndim) * pull

    return denoise


@dataclass(frozen=True)
class GuidedDiffusion:
    """The part of a `Diffusion` that sampling needs, guided by a classifier."""

    diffusion: Diffusion
    classify: LogProbabilities
    scale: float
    class_cond: bool                                                # whether the network is class-conditional

    @property
    def scaling(self) -> Precond:
        """The scalings around the network, those of `diffusion`."""
        return self.diffusion.scaling

    def bind(self, model: nn.Module) -> Denoiser:
        """The guided denoiser of a network; it takes the classes y [N]."""
        return guided(self.diffusion.bind(model), self.classify, self.scale, self.class_cond)
