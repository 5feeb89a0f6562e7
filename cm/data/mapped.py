"""A stream of batches that applies a function, such as augmentation, to every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from cm.types import Batch

Batches = Callable[[int], Iterator[Batch]]
"""From the number of samples already consumed by the run to the endless stream of this rank's batches."""


@runtime_checkable
class _Closable(Protocol):
    """A stream with processes or files behind it."""

    def close(self) -> None:
        """End them."""


class MappedStream:
    """The batches of a stream, each changed by the function `change`."""

    def __init__(self, batches: Iterator[Batch], change: Callable[[Batch], Batch]):
        self.batches, self.change = batches, change

    def __iter__(self) -> MappedStream:
        return self

    def __next__(self) -> Batch:
        return self.change(next(self.batches))

    def close(self) -> None:
        """End the loader processes behind the stream."""
        if isinstance(self.batches, _Closable):
            self.batches.close()


def mapped(data: Batches, change: Callable[[Batch], Batch]) -> Batches:
    """A version of `data` whose batches are changed."""
    return lambda start: MappedStream(data(start), change)
