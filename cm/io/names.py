"""Many names in two arrays; a million Python strings would take hundreds of megabytes in every process."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

CODEC = ("utf-8", "surrogatepass")
"""The order of names as bytes is their order as texts, and what a file system cannot decode survives."""
ROWS_AT_ONCE = 2**16                                                # bounds the index that gathers bytes


class NameTable(Sequence[str]):
    """N names, which never change.

    :param text: uint8, all names one after the other, encoded by CODEC.
    :param ends: integers [N], where in the text each name ends.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self._ends = text, ends.astype(np.uint32 if len(text) < 2**32 else np.int64, copy=False)

    @classmethod
    def of(cls, names: Iterable[bytes]) -> NameTable:
        """A table of names that are encoded already."""
        text, ends = bytearray(), array("q")
        for name in names:
            text += name
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    @classmethod
    def joined(cls, tables: Sequence[NameTable]) -> NameTable:
        """The names of several tables, one after the other."""
        text = _concatenated([table.text for table in tables], np.uint8)
        return cls(text, np.cumsum(_concatenated([table.lengths.astype(np.uint32) for table in tables], np.uint32)))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[row] for row in range(*i.indices(len(self)))]
        return self.encoded(i).decode(*CODEC)

    def __iter__(self) -> Iterator[str]:
        return (name.decode(*CODEC) for name in self.each_encoded())

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of each name, int64 [N]."""
        return np.diff(self._ends.astype(np.int64), prepend=0)

    @property
    def starts(self) -> np.ndarray:
        """The position in the text at which each name begins, int64 [N]."""
        return self._ends - self.lengths

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes."""
        return self.text.nbytes + self._ends.nbytes

    def encoded(self, i: int) -> bytes:
        """Name i in bytes.

        :raises IndexError: if there is none.
        """
        end = int(self._ends[i])                                    # numpy's own IndexError
        i %= len(self)
        return self.text[int(self._ends[i - 1]) if i else 0 : end].tobytes()

    def each_encoded(self) -> Iterator[bytes]:
        """The names in bytes, in order."""
        for first in range(0, len(self), ROWS_AT_ONCE):
            ends = self._ends[first : first + ROWS_AT_ONCE].tolist()
            start = shift = int(self._ends[first - 1]) if first else 0
            text = self.text[shift : ends[-1]].tobytes()
            for end in ends:
                yield text[start - shift : end - shift]
                start = end

    def rows_named(self, name: bytes) -> np.ndarray:
        """The rows of a name, int64 [M]."""
        rows = np.flatnonzero(self.lengths == len(name))
        starts = self.starts
        for place, byte in enumerate(name):
            rows = rows[self.text[starts[rows] + place] == byte]
        return rows

    def rows_at(self, places: np.ndarray) -> np.ndarray:
        """The names that these places of the text, int64 [M], belong to: int64 [M]."""
        return np.searchsorted(self._ends, places, side="right")

    def padded(self, rows: np.ndarray, width: int) -> np.ndarray:
        """The names of these rows, int64 [M], as words of one width, filled up with zeros: S<width> [M]."""
        table, lengths, starts = np.zeros((len(rows), width), np.uint8), self.lengths, self.starts
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            block = table[first : first + ROWS_AT_ONCE].reshape(-1)
            block[spans(np.arange(len(part)) * width, lengths[part])] = self.text[spans(starts[part], lengths[part])]
        return table.view(f"S{width}")[:, 0]

    def take(self, rows: np.ndarray) -> NameTable:
        """The names of these rows, int64 [M], in that order."""
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():    # mostly all of them
            start = int(self._ends[rows[0] - 1]) if rows[0] else 0
            ends = self._ends[rows[0] : rows[-1] + 1] - start
            return NameTable(self.text[start : start + int(ends[-1])], ends)
        lengths = self.lengths
        ends = np.cumsum(lengths[rows])
        text = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            places = spans(self._ends[part].astype(np.int64) - lengths[part], lengths[part])
            begin = int(ends[first] - lengths[part[0]])
            text[begin : begin + len(places)] = self.text[places]
        return NameTable(text, ends)


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places start, start + 1, ... of each span, one span after the other: int64 [lengths.sum()]."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _concatenated(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)
