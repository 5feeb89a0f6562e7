"""Distances between two batches of images, one number per sample: (a, b) [N,C,H,W] -> [N].

All arithmetic is in the dtype of the images. A distance is part of a loss: gradients flow through a and b if they
require them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from cm.errors import UserError
from cm.networks.layers import without_autocast
from cm.objectives.lpips import check_lpips_channels, lpips_network
from cm.registry import lookup

Distance = Callable[[Tensor, Tensor], Tensor]


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (a - b).abs().flatten(1).mean(1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return (a - b).square().flatten(1).mean(1)


def l2_32(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference at 32x32 pixels; it ignores details that a 32x32 image cannot show."""
    difference = a - b                                             # resizing is linear: one resize instead of two
    if difference.shape[-2:] != (32, 32):
        difference = F.interpolate(difference, size=(32, 32), mode="bilinear", align_corners=False)
    return difference.square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|a-b|^2 + c^2) - c over the whole sample: Song and Dhariwal 2023 (arXiv 2310.14189).

    The norm is over the whole sample, so c is relative to the distance between two images, not between two pixels.

    :param c: below it the distance is a square, above it a norm; by default 0.00054 sqrt(CHW).
    """
    squared = (a - b).square().flatten(1)                          # [N, CHW]
    c = 0.00054 * math.sqrt(squared.shape[1]) if c is None else c
    total = squared.sum(1)
    return total / ((total + c**2).sqrt() + c)                     # the definition, without its cancellation near 0


def lpips(a: Tensor, b: Tensor) -> Tensor:
    """Perceptual distance: Zhang et al. 2018 (arXiv 1801.03924), VGG-16 with average pooling; images in [-1,1].

    Images narrower than 256 pixels are first enlarged to 224x224, the training size of VGG. The network is built when
    it is first needed. Grey images, of one channel, are converted to RGB.

    :raises UserError: for latents, which do not have 1 or 3 channels; if the package `piq` or a file of weights is
        missing, see `cm.objectives.lpips`.
    """
    check_lpips_channels(a.shape[1])
    if a.shape[1] == 1:
        a, b = (images.expand(-1, 3, -1, -1) for images in (a, b))
    if a.shape[-1] < 256:
        a, b = (F.interpolate(images, size=224, mode="bilinear", align_corners=False) for images in (a, b))
    # bfloat16 features of neighbours on a grid of noise levels would differ by their rounding more than by themselves
    with without_autocast(a.device):
        return lpips_network(a.device, a.dtype)((a + 1) / 2, (b + 1) / 2)


DISTANCES: dict[str, Distance] = {
    "l1": l1,
    "l2": l2,
    "l2-32": l2_32,
    "lpips": lpips,
    "pseudo-huber": pseudo_huber,
}


def get_distance(loss_norm: str, huber_c: float = 0.0) -> Distance:
    """The distance of that name.

    :param huber_c: c of `pseudo_huber`; 0 for 0.00054 sqrt(CHW).
    :raises ValueError: for a name that is not in DISTANCES, and for a huber_c with another distance.
    """
    distance = lookup(DISTANCES, loss_norm, "loss_norm")
    if huber_c and distance is not pseudo_huber:
        raise UserError(f"--huber_c {huber_c:g} is for --loss_norm pseudo-huber, not for {loss_norm}; drop one of them")
    return partial(pseudo_huber, c=huber_c) if huber_c else distance
