"""Batches that carry reference images: the newest n of the whole run, the same on every rank.

Step k's references are the images at the run's positions (k+1)B-n .. (k+1)B-1, so they end with the step's own batch of
B. Only images that training reads anyway are read: each rank reads its share of the batch, the ranks exchange them, and
the last n stay in memory as uint8. A run that starts or resumes reads the n-B images before its first step once.
References that are augmented are the images as training sees them, and stay in memory as float32.

Shapes: B images of a step over all ranks, S image_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch as th

from cm.data.loader import BatchStream
from cm.types import Batch

Gather = Callable[[Any], list[Any]]


def with_references(
    stream: BatchStream, n: int, start: int, rank: int, world_size: int, gather: Gather,
    augment: Callable[[Batch], Batch] | None = None,
) -> Iterator[Batch]:
    """The batches of `stream`, each with `references`: images [n,C,S,S], uint8 or latents, cond and positions, in
    order.

    :param n: at least the number of images per step.
    :param start: samples that the run has consumed already, the same as for `stream`.
    :param gather: an object of each rank -> the list of all of them, on every rank; all ranks call it for each batch.
    :param augment: a transform of a batch and its references, by their positions; the references are then float32.
    """
    held: list[Batch] | None = None                                 # the images of the steps before, at least n-B
    with closing(stream):
        for batch in stream:
            if held is None:
                past = _past(stream, n - sum(gather(len(batch))), start, rank, world_size)
                held = gather(_on_cpu(augment(as_floats(past))) if augment else past)
            if augment:
                batch = augment(batch)
                own = _on_cpu(batch)
            else:
                own = Batch(stream.stored(batch.images), batch.cond, batch.positions)
            batch.references = _newest(n, *held, *gather(own))
            held = [batch.references]
            yield batch


def as_floats(batch: Batch) -> Batch:
    """Images uint8 -> float32 in [-1, 1]; latents as they are."""
    if batch.images.is_floating_point():
        return batch
    return replace(batch, images=batch.images.float().div_(127.5).sub_(1))


def _on_cpu(batch: Batch) -> Batch:
    """The batch on the CPU, where the ranks exchange it."""
    return Batch(batch.images.cpu(), {name: value.cpu() for name, value in batch.cond.items()}, batch.positions)


def _past(stream: BatchStream, count: int, start: int, rank: int, world_size: int) -> Batch:
    """This rank's share of the `count` images before `start`, or of a few more so that all ranks have equally many.

    The positions before 0 are an epoch of their own.
    """
    share = max(1, -(-count // world_size))
    return stream.read(start - world_size * share + rank + world_size * np.arange(share))


def _newest(n: int, *parts: Batch) -> Batch:
    """The n images with the highest positions, in order."""
    positions = th.cat([part.positions for part in parts if part.positions is not None])
    kept = positions.argsort()[-n:]
    cond = {name: th.cat([part.cond[name] for part in parts])[kept] for name in parts[0].cond}
    return Batch(th.cat([part.images for part in parts])[kept], cond, positions[kept])
