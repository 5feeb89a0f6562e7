"""Which image each position of a run shows, and which positions a rank reads: both depend on the seed alone.

Shapes: B images of a rank's batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cm.errors import UserError
from cm.random_util import stream_seed

Order = Callable[[np.ndarray], np.ndarray]                          # positions [B] -> indices of the images [B]


def offsets_of_rank(batch_size: int, rank: int, world_size: int, global_batch: int | None) -> np.ndarray:
    """The positions within a step that this rank reads: int64 [B].

    :raises UserError: if `batch_size` is not this rank's share of `global_batch`.
    :raises ValueError: for an impossible rank.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: a rank needs at least one image per step")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of 0..{world_size - 1}")
    offsets = np.arange(rank, world_size * batch_size if global_batch is None else global_batch, world_size)
    if len(offsets) != batch_size:
        raise UserError(
            f"rank {rank} of {world_size} has {len(offsets)} of the {global_batch} images of a step, not {batch_size}"
        )
    return offsets


class EpochOrder:
    """The image of each position of a run. Holds the permutation of one epoch, 8 bytes per image."""

    def __init__(self, length: int, seed: int, shuffle: bool = True):
        self._length = length
        self._seed = seed
        self._shuffle = shuffle
        self._epoch: int | None = None
        self._permutation = np.arange(length)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [B], ascending -> index of the image at each of these positions, int64 [B]."""
        epochs, places = np.divmod(positions, self._length)
        if not self._shuffle:
            return places
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._of_epoch(int(epoch))[places[here]]
        return indices

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            bits = np.random.Philox(key=stream_seed(self._seed, "order", epoch))
            self._permutation = np.random.Generator(bits).permutation(self._length)
            self._epoch = epoch
        return self._permutation


class Requests:
    """The positions and image indices of this rank's batches, without end: pairs of int64 [B]."""

    def __init__(self, order: Order, offsets: np.ndarray, global_batch: int, start: int):
        self.order = order
        self._offsets = offsets
        self._global_batch = global_batch
        self._start = start

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first = self._start
        while True:
            positions = first + self._offsets
            yield positions, self.order(positions)
            first += self._global_batch
