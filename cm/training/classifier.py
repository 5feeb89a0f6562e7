"""Training of a classifier of noisy images, and its accuracy at a noise level."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cm.networks.classifier_fit import fit
from cm.networks.noisy_classifier import NoisyClassifier, NoisyClassifierConfig
from cm.random_util import undisturbed
from cm.tensors import append_dims


def train_noisy_classifier(
    images: NDArray[Any],
    labels: NDArray[np.integer],
    config: NoisyClassifierConfig,
    *,
    epochs: int = 15,
    batch_size: int = 64,
    lr: float = 4e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    device: th.device | str = "cpu",
    progress: bool = True,
) -> NoisyClassifier:
    """Train on images [N,H,W,C] and labels [N]; the noise level of each is drawn log-uniformly over the config's.

    Torch's global generator is left as it was.
    """
    x, y = to_images(images).to(device), th.as_tensor(labels, dtype=th.int64).to(device)
    with undisturbed(device):
        th.manual_seed(seed)
        model = NoisyClassifier(config).to(device)

        def loss_of(rows: Tensor) -> Tensor:
            noisy, sigma = add_noise(x[rows], config)
            return F.cross_entropy(model(noisy, sigma), y[rows])

        fit(model, loss_of, len(x), epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
            shown=progress)
    return model.eval().requires_grad_(False)


def add_noise(x: Tensor, config: NoisyClassifierConfig) -> tuple[Tensor, Tensor]:
    low, high = math.log(config.sigma_min), math.log(config.sigma_max)
    sigma = (low + (high - low) * th.rand(len(x), device=x.device)).exp()
    return x + append_dims(sigma, x.ndim) * th.randn_like(x), sigma


@th.inference_mode()
def accuracy_at(
    model: NoisyClassifier, images: NDArray[Any], labels: NDArray[np.integer], sigma: float, seed: int = 0,
    batch_size: int = 512,
) -> float:
    """The share of images [N,H,W,C] that are classified correctly at one noise level."""
    device, right = next(model.parameters()).device, 0
    rng = th.Generator().manual_seed(seed)
    for x, y in zip(to_images(images).split(batch_size), th.as_tensor(labels).split(batch_size)):
        noisy = (x + sigma * th.randn(x.shape, generator=rng)).to(device)
        right += int((model(noisy, noisy.new_full((len(x),), sigma)).argmax(1).cpu() == y).sum())
    return right / len(images)


def to_images(images: NDArray[Any]) -> Tensor:
    """[N,H,W,C] uint8 -> [N,C,H,W] in [-1, 1]; latents, as floats, keep their values."""
    x = th.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return x if x.is_floating_point() else x.float().div_(127.5).sub_(1)
