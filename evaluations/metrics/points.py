"""Features of single images, in one process or distributed over the ranks that computed them.

A metric asks a `PointSet` for what it needs of the complete set; all ranks must call every method together.

Shapes: N points of the set, n of them on this rank, D feature dimensions, B points of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluations.metrics.arrays import Array

T = TypeVar("T")


class Ranks:
    """The ranks that work together: here a single process. `evaluations.engine.ranks` has the ranks of a job."""

    rank = 0
    count = 1

    def sum(self, array: NDArray[Any]) -> NDArray[Any]:
        """The sum of an array over ranks, on every rank; the array itself may be overwritten."""
        return array

    def max(self, array: NDArray[Any]) -> NDArray[Any]:
        """The elementwise maximum of an array over ranks, on every rank; the array itself may be overwritten."""
        return array

    def broadcast(self, value: T | None, owner: int) -> T:
        """The argument of rank `owner`, on every rank."""
        assert value is not None and owner == 0
        return value

    def gather(self, value: T) -> list[T]:
        """The objects of all ranks, in the order of ranks, on every rank."""
        return [value]

    def on_main(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(*args)` on rank 0 only; its result or its exception on every rank."""
        return function(*args)


ONE_PROCESS = Ranks()


class PointSet:
    """N points; this rank has n of them, `points` [n,D].

    :param places: [n], their indices in the set; None: 0, 1, ...
    :param count: N; None: n.
    """

    def __init__(
        self, points: Array, places: NDArray[np.int64] | None = None, count: int | None = None,
        ranks: Ranks = ONE_PROCESS,
    ):
        self.points = points
        self.places = np.arange(len(points)) if places is None else places
        self.count = len(points) if count is None else count
        self.ranks = ranks

    def mean(self) -> Array:
        """The mean of the complete set: [D], in the dtype of the points."""
        total = self.ranks.sum(self.points.sum(0, dtype=np.float64))
        return (total / self.count).astype(self.points.dtype)

    def longest(self) -> float:
        """The largest squared norm of a point."""
        here = np.einsum("nd,nd->n", self.points, self.points).max(initial=0)
        return float(self.ranks.max(np.array(here, np.float64)))

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self.places)

    def rows(self, places: NDArray[np.int64]) -> Array:
        """The points at these places of the set, on every rank: [len(places),D] float64."""
        at = np.searchsorted(self.places, places, sorter=self._order)
        mine = at < len(self._order)
        mine[mine] = self.places[self._order[at[mine]]] == places[mine]
        rows = np.zeros((len(places), self.points.shape[1]))
        rows[mine] = self.points[self._order[at[mine]]]
        return self.ranks.sum(rows)

    def blocks(self, size: int) -> Iterator[tuple[int, slice, Array]]:
        """Every rank's points in turn, on all ranks: their owner, their rows there, and the points [B,D], B <= size."""
        for owner, count in enumerate(self.ranks.gather(len(self.points))):
            for rows in blocks(count, size):
                mine = self.points[rows] if owner == self.ranks.rank else None
                yield owner, rows, self.ranks.broadcast(mine, owner)


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cut 0, ..., count - 1 into runs."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
