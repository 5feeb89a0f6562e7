"""The ranks of a job, as the metrics and the engine see them: numpy arrays in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from cm.distributed import setup as dist
from cm.errors import UserError
from evaluations.metrics.base import Partial
from evaluations.metrics.points import Ranks, T


class JobRanks(Ranks):
    """All ranks of this job, one or many; every method is one step of all of them together."""

    def __init__(self):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def sum(self, array: NDArray[Any]) -> NDArray[Any]:
        """The sum over ranks; the array itself is overwritten."""
        return dist.all_reduce_sum(th.from_numpy(np.asarray(array))).numpy()

    def max(self, array: NDArray[Any]) -> NDArray[Any]:
        """The elementwise maximum over ranks; the array itself is overwritten."""
        return dist.all_reduce_max(th.from_numpy(np.asarray(array))).numpy()

    def broadcast(self, value: T | None, owner: int) -> T:
        """The argument of rank `owner`."""
        return dist.broadcast_object(value, owner)

    def gather(self, value: T) -> list[T]:
        """The arguments of all ranks."""
        return dist.all_gather_object(value)

    def on_main(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, called on rank 0 alone."""
        return dist.on_main(function, *args)


def agree(ranks: Ranks, error: UserError | None) -> None:
    """:raises UserError: on every rank that of the first rank that has one."""
    errors = [text for text in ranks.gather(None if error is None else str(error)) if text is not None]
    if errors:
        raise error or UserError(errors[0])


def over_ranks(partial: Partial, ranks: Ranks) -> Any:
    """One like `partial` with the sums of all ranks; `partial` itself stays as it is."""
    return partial.with_sums([_summed(np.asarray(each), ranks) for each in partial.sums()])


def _summed(array: NDArray[Any], ranks: Ranks) -> NDArray[Any]:
    """The sum of arrays that may be of different shapes: what is missing counts as 0."""
    shape = ranks.max(np.array(array.shape, np.int64))
    if tuple(shape) == array.shape:
        return ranks.sum(array.copy())
    filled = np.zeros(shape, array.dtype)
    filled[tuple(slice(0, length) for length in array.shape)] = array
    return ranks.sum(filled)
