"""LSUN's databases: lmdb files, read without the library, which maps the file and trusts every number in it.

A file that is cut off or damaged kills a process that uses the library; here it is an error. Numbers are little-endian.
A page has a number of 8 bytes, 2 unused, flags of 2, and 2 + 2 for the ends of its free space; then the 2-byte places
of its nodes. A node has 2 + 2 bytes for the size of its value (in a branch, with the flags: for the number of a page),
flags of 2, the size of its key of 2, the key and the value, or the number of the first page that holds the value. The
first two pages hold, after their headers, the roots of two moments: the one of the later transaction counts.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cm.errors import UserError
from cm.io.budget import PICTURE, open_regular

MAGIC, VERSION = 0xBEEFC0DE, 1
PAGE_HEADER = struct.Struct("<QHHHH")                               # number, unused, flags, free space: from, to
META = struct.Struct("<IIQQ")                                       # magic, version, address, size of the map
TABLE = struct.Struct("<IHHQQQQQ")                                  # page size, flags, depth, 3 counts, entries, root
ENDS = struct.Struct("<QQ")                                         # last page, transaction
NODE = struct.Struct("<HHHH")                                       # size or page, low and high; flags; size of the key
BRANCH, LEAF = 1, 2
BIG_DATA, SUB_DATA, DUP_DATA = 1, 2, 4
DUPLICATES = 0x04                                                   # flag of a table with several values for a key
NO_ROOT = 2**64 - 1
PAGE_SIZES = [2**power for power in range(8, 17)]
DEEPEST = 32


class Table(NamedTuple):
    """The part of a file's head that is needed."""

    page_bytes: int
    root: int
    entries: int
    flags: int
    transaction: int
    last_page: int


class Entry(NamedTuple):
    """A key, and where its value is."""

    key: bytes
    place: int
    size: int


class LmdbFile:
    """The entries of `data.mdb` in a folder, in the order of their keys; for one process.

    :raises UserError: if there is no such file, or it is empty, cut off or of another kind.
    """

    def __init__(self, folder: Path):
        self.path = folder / "data.mdb"
        if not self.path.exists():
            raise UserError(f"{folder} is not an lmdb folder: there is no {self.path}")
        self.file = open_regular(self.path)
        self.size = os.fstat(self.file.fileno()).st_size
        self.table = self._newest_table()
        used = (self.table.last_page + 1) * self.table.page_bytes
        if used > self.size:
            raise self._damaged(f"it is cut off: {used:,} bytes are used, {self.size:,} are there")
        if self.table.flags & DUPLICATES:
            raise self._damaged("it has several values for a key, as no LSUN database has")
        if not self.table.entries or self.table.root == NO_ROOT:
            raise UserError(f"{folder} is empty")

    def __len__(self) -> int:
        """The number of entries, as the file says it."""
        return self.table.entries

    def entries(self) -> Iterator[Entry]:
        """All entries.

        :raises UserError: at a damaged page.
        """
        waiting, visited = [(self.table.root, 1)], 0
        while waiting:
            number, depth = waiting.pop()
            visited += 1
            if depth > DEEPEST or visited > self.size // self.table.page_bytes:
                raise self._damaged("its pages lead back to themselves")
            flags, nodes = self._page(number)
            if flags & LEAF:
                yield from nodes
            else:
                waiting += [(node.place, depth + 1) for node in reversed(nodes)]

    def value(self, entry: Entry) -> bytes:
        """The value of an entry.

        :raises UserError: if it is larger than an image may be, or lies outside of the file.
        """
        if entry.size > PICTURE.bytes or entry.place + entry.size > self.size:
            raise self._damaged(f"{entry.size:,} bytes at {entry.place:,} are no image of this file")
        return self._bytes_at(entry.place, entry.size)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.path} cannot be read as an lmdb database: {why}; is the download complete?")

    def _bytes_at(self, place: int, size: int) -> bytes:
        data = os.pread(self.file.fileno(), size, place)
        if len(data) < size:
            raise self._damaged(f"it ends before byte {place + size:,}")
        return data

    def _newest_table(self) -> Table:
        first = self._table_at(0)
        second = self._table_at(first.page_bytes)
        return max(first, second, key=lambda table: table.transaction)

    def _table_at(self, start: int) -> Table:
        size = META.size + 2 * TABLE.size + ENDS.size
        data = self._bytes_at(start + PAGE_HEADER.size, size)
        magic, version, _, _ = META.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION):
            raise self._damaged("it does not begin as one")
        page_bytes = TABLE.unpack_from(data, META.size)[0]
        if page_bytes not in PAGE_SIZES:
            raise self._damaged(f"its pages would have {page_bytes:,} bytes")
        _, flags, _, _, _, _, entries, root = TABLE.unpack_from(data, META.size + TABLE.size)
        last_page, transaction = ENDS.unpack_from(data, size - ENDS.size)
        return Table(page_bytes, root, entries, flags, transaction, last_page)

    def _page(self, number: int) -> tuple[int, list[Entry]]:
        """The flags and the nodes of a page; of a branch, the place is the number of the page below."""
        length = self.table.page_bytes
        if (number + 1) * length > self.size:
            raise self._damaged(f"page {number:,} lies behind its end")
        page = self._bytes_at(number * length, length)
        _, _, flags, lower, _ = PAGE_HEADER.unpack_from(page)
        if flags & (BRANCH | LEAF) not in (BRANCH, LEAF) or not PAGE_HEADER.size <= lower <= length:
            raise self._damaged(f"page {number:,} is none of a tree")
        places = struct.unpack_from(f"<{(lower - PAGE_HEADER.size) // 2}H", page, PAGE_HEADER.size)
        try:
            return flags, [self._node(page, place, number * length, bool(flags & LEAF)) for place in places]
        except struct.error:
            raise self._damaged(f"page {number:,} has nodes outside of it") from None

    def _node(self, page: bytes, place: int, start: int, is_leaf: bool) -> Entry:
        low, high, flags, key_bytes = NODE.unpack_from(page, place)
        begin = place + NODE.size + key_bytes
        key = page[place + NODE.size : begin]
        if not is_leaf:
            return Entry(key, low | high << 16 | flags << 32, 0)
        size = low | high << 16
        if flags & (SUB_DATA | DUP_DATA):
            raise self._damaged("it has tables within tables, as no LSUN database has")
        if flags & BIG_DATA:
            return Entry(key, struct.unpack_from("<Q", page, begin)[0] * len(page) + PAGE_HEADER.size, size)
        if begin + size > len(page):
            raise self._damaged("a value is longer than its page")
        return Entry(key, start + begin, size)
