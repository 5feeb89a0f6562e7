"""Stable target field: Xu, Tong and Jaakkola 2023 (arXiv 2302.00670), equation 6 and algorithm 1.

Many images could have become the noisy x; the target is their average by likelihood, not the one image that did.

Shapes: N batch, n references, C channels, H and W height and width, d = C H W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.objectives.edm import EDM, error_terms
from cm.tensors import append_dims
from cm.types import Batch, LossTerms, Networks, NoiseSource

AUGMENTATION = "augment_labels"                                     # key in a batch's conditioning
CHUNK = 512                                                         # references that are converted to float64 at a time


@dataclass
class STF(EDM):
    """weight(sigma) mean(D(x, sigma) - sum_i w_i y_i)^2 with w = softmax_i(-|x - y_i|^2 / (2 sigma^2)).

    The y_i are the sample's own image and the references that `peers` allows. Given them and x, the target is the
    expectation of the sample's own image: the mean gradient is that of EDM's loss, with less variance.

    :param num_references: how many images a sample's target is made of; they come as `Batch.references`.
    :param augment_references: whether the data source augments them as it augments the samples.
    """

    options: ClassVar[tuple[str, ...]] = ("num_references", "augment_references")

    num_references: int = 4096
    augment_references: bool = True

    @property
    def references(self) -> int:
        return self.num_references

    def terms(self, nets: Networks, batch: Batch, noise: Tensor, sigma: Tensor, rng: NoiseSource) -> LossTerms:
        if batch.references is None:
            raise UserError("the stable target field needs reference images, but this data source gives none: "
                            "open it with references (cm.data.reference_batches), or train with --objective edm")
        x0 = batch.images
        x = x0 + noise * append_dims(sigma, x0.ndim)
        target, effective = stable_target(x, x0, sigma, batch.references, peers(batch, batch.references))
        terms = error_terms(nets.online(x, sigma, **batch.cond), target, sigma, self.weight)
        return LossTerms(terms.loss, sigma, {**terms.logs, "effective_references": effective})


def peers(batch: Batch, references: Batch) -> Tensor:
    """Which references a sample's target may contain: bool [N,n].

    They share the sample's class. References that were augmented as the samples were all count, whatever their
    transforms (so do those of the published code). Without augmentation labels references count as not augmented, and
    only for samples whose labels are zero, too. The sample itself is left out: its own image stands for it.
    """
    if batch.positions is None or references.positions is None:
        raise ValueError("a sample's own image is found among the references by its position: give positions to both "
                         "batches")
    shared = (batch.positions[:, None] != references.positions).to(batch.images.device, non_blocking=True)
    for name, own in batch.cond.items():
        own = own.flatten(1) if own.ndim > 1 else own[:, None]      # [N,k]
        theirs = references.cond.get(name)
        if name == AUGMENTATION and theirs is not None:
            continue
        theirs = own.new_zeros(1, own.shape[1]) if theirs is None else theirs.reshape(-1, own.shape[1])
        for column, their_column in zip(own.T, theirs.T):
            shared &= column[:, None] == their_column
    return shared


@th.no_grad()
def stable_target(x: Tensor, own: Tensor, sigma: Tensor, references: Batch, peers: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted average of the images that may have become x, and their effective number 1 / sum w^2, [N].

    Computed in float64, since |x|^2 + |y|^2 - 2 x.y is a small difference, divided by a small sigma^2. Autocast does
    not change float64. The memory is N x n numbers and a chunk of the references.

    :param x: noisy images [N,C,H,W] at levels sigma [N], made of the images `own`.
    :param references: images [n,C,H,W], float or bytes.
    :param peers: bool [N,n], the references that count.
    """
    flat, image = x.flatten(1).double(), own.flatten(1).double()    # [N,d]
    over = 2 * sigma.double()[:, None] ** 2
    chunks = references.images.split(CHUNK)
    logits = [-(flat - image).square().sum(1, keepdim=True) / over]                         # [N,1]
    for chunk in chunks:
        y = as_points(chunk)                                        # [<=CHUNK,d]
        logits.append((2 * flat @ y.T - y.square().sum(1) - flat.square().sum(1, keepdim=True)) / over)
    logits = th.cat(logits, 1)                                      # [N,1+n]
    logits[:, 1:].masked_fill_(~peers, float("-inf"))
    w = logits.softmax(1)
    target = w[:, :1] * image
    for chunk, share in zip(chunks, w[:, 1:].split(CHUNK, 1)):
        target += share @ as_points(chunk)
    return target.view_as(x).to(x.dtype), (1 / w.square().sum(1)).to(x.dtype)


def as_points(images: Tensor) -> Tensor:
    """[n,C,H,W], float or bytes -> float64 [n,d] in [-1, 1]."""
    points = images.flatten(1).double()
    return points if images.is_floating_point() else points.div_(127.5).sub_(1)
