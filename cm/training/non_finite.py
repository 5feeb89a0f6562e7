"""The error for a loss or gradient that is not finite, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th
from torch import Tensor

from cm.distributed import setup as dist
from cm.types import Batch, LossTerms

SHOWN = 16


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; raised on every rank before the weights are touched."""


def all_finite(parts: Sequence[tuple[Batch, LossTerms]]) -> Tensor:
    """Whether every loss of this rank's step is finite: a boolean scalar that is not waited for."""
    return th.stack([terms.loss.detach().isfinite().all() for _, terms in parts]).all()


def explain(step: int, parts: Sequence[tuple[Batch, LossTerms]], why: str, remedy: str) -> NonFiniteError:
    """The error for a step, the same on every rank. All ranks must call this.

    :param parts: the microbatches of this rank and the terms of their losses.
    """
    samples = [sample for rank in dist.all_gather_object(describe(parts)) for sample in rank]
    culprits = [sample for sample in samples if not sample["finite"]]
    if culprits:
        what = f"the loss is not finite for {len(culprits)} of its {len(samples)} samples"
    else:
        what = f"every loss is finite, but not the gradient of its {len(samples)} samples"
    named = sorted(culprits or samples, key=lambda sample: sample["position"])
    words = [
        f"image {sample['image']} at sigma {sample['sigma']:.4g} (loss {sample['loss']:.4g}, rank {sample['rank']})"
        for sample in named[:SHOWN]
    ]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return NonFiniteError(
        f"step {step}: {what}{why}: {'; '.join(words)}{more}. The weights are untouched. {remedy}"
    )


def describe(parts: Sequence[tuple[Batch, LossTerms]]) -> list[dict]:
    """Plain facts about the samples of this rank."""
    rank, facts = dist.get_rank(), []
    for batch, terms in parts:
        images = ["?"] * len(batch) if batch.indices is None else batch.indices.tolist()
        positions = images if batch.positions is None else batch.positions.tolist()
        columns = zip(positions, images, terms.sigma.tolist(), terms.loss.tolist())
        for position, image, sigma, loss in columns:
            facts.append({
                "position": position, "image": image, "sigma": sigma, "loss": loss, "rank": rank,
                "finite": loss - loss == 0,
            })
    return facts
