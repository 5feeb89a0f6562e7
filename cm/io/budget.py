"""What reading a file may cost: bytes, values, depth and seconds, a budget for each kind of file.

A file of two hundred bytes can ask for all memory, and a named pipe for all time. Every reader of a file that somebody
else may have written opens it here, or takes its limits from here.
"""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

from cm.errors import UserError

CHUNK_BYTES = 2**20                                         # read at once
LONGEST_NUMBER = 300                                        # digits; what is larger does not fit in a float
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
         stat.S_IFDIR: "a folder"}


@dataclass(frozen=True)
class Budget:
    """The limits for a file. A node is a value, such as a number, a text, a list or an operation of a pickle."""

    bytes: int
    nodes: int = 1_000_000
    depth: int = 100
    seconds: float = 60.0


MIB = 2**20
SETTINGS = Budget(1 * MIB)                                  # configs, sidecars, best.json, summaries of an evaluation
MANIFEST = Budget(16 * MIB)                                 # of a checkpoint
SCORES = Budget(64 * MIB, 4_000_000)                        # of a schedule search
LOG = Budget(64 * MIB, 4_000_000)                           # progress.csv and its siblings; a node is a cell
GRIDS = Budget(256 * MIB)                                   # all pictures of samples of a run
PICTURE = Budget(512 * MIB)                                 # the file of one image
PICKLE = Budget(64 * MIB, 2_000_000, 200)                   # one without the values of tensors; a node is an operation
WEIGHTS = Budget(2**40, 2_000_000, 200)                     # a pickle with them inside
HEADER = Budget(16 * MIB)                                   # of a safetensors file
GRAPH = Budget(512 * MIB, 2_000_000)                        # a frozen TensorFlow graph; a node is a field
INFLATED = Budget(256 * MIB)                                # of one part of an archive that packing made much smaller
ARCHIVE = Budget(256 * MIB, 1000)                           # CIFAR-10's archive unpacked, which has 186 MB in 8 files


class Meter:
    """Counts what a reader has used of a budget.

    :raises ValueError: from `spend`, as soon as it is used up.
    """

    def __init__(self, budget: Budget):
        self.budget, self.nodes, self.bytes, self.start_time = budget, 0, 0, time.monotonic()

    def spend(self, nodes: int = 1, size: int = 0) -> None:
        """Note so many more values, and bytes."""
        self.nodes += nodes
        self.bytes += size
        if self.nodes > self.budget.nodes:
            raise ValueError(f"it has more than {self.budget.nodes:,} values")
        if self.bytes > self.budget.bytes:
            raise ValueError(f"it has more than {self.budget.bytes:,} bytes")
        if time.monotonic() - self.start_time > self.budget.seconds:
            raise ValueError(f"reading it takes more than {self.budget.seconds:g} s")

    def descend(self, depth: int) -> None:
        """Note values nested so deeply."""
        if depth > self.budget.depth:
            raise ValueError(f"it is nested more than {self.budget.depth} levels deep")


# --- opening ---------------------------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a local file for reading. Reading a pipe or a device would wait, or go on, for ever.

    :raises OSError: as `open`.
    :raises UserError: if something other than a file is there.
    """
    # Opened without waiting for a writer of a pipe, and looked at afterwards: it cannot be exchanged in between.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise UserError(f"{os.fspath(path)} is {KINDS.get(kind, 'something else')}, where a file is expected; copy its "
                        "content to a file, or name another one")
    return cast(BinaryIO, os.fdopen(descriptor, "rb"))


def read_bytes(path: str | os.PathLike[str], budget: Budget) -> bytes:
    """The content of a local file.

    :raises OSError: as `open`.
    :raises UserError: if something other than a file is there.
    :raises ValueError: if it has more bytes than the budget.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > budget.bytes:  # of a sparse file, before anything is read
            raise ValueError(f"it has more than {budget.bytes:,} bytes")
        return read_file(file, budget.bytes)


def read_file(file: IO[bytes], limit: int) -> bytes:
    """The whole content of an open file.

    :raises ValueError: if it has more than `limit` bytes.
    """
    parts, size = [], 0
    while part := file.read(CHUNK_BYTES):                   # all that is asked for is set aside, even for a short file
        parts.append(part)
        size += len(part)
        if size > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
    return b"".join(parts)


def read_text(path: str | os.PathLike[str], budget: Budget) -> str:
    """The text of a local file of lines, whose cells are its nodes; what is no UTF-8 becomes U+FFFD.

    :raises OSError, UserError, ValueError: as `read_bytes`, and if it has more cells than the budget.
    """
    data = read_bytes(path, budget)
    if data.count(b",") + data.count(b"\n") > budget.nodes:
        raise ValueError(f"it has more than {budget.nodes:,} cells")
    return data.decode(errors="replace")


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: str | os.PathLike[str], budget: Budget) -> Any:
    """What a local JSON file says.

    :raises OSError, UserError, ValueError: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, budget), budget)


def parse_json(text: bytes | str, budget: Budget = SETTINGS) -> Any:
    """What a JSON text says.

    :raises ValueError: if it is none, holds more values than the budget, nested more deeply, or a whole number that
        is too large for a float.
    """
    check_size(text, budget)
    try:
        content = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content, budget.depth)
    return content


def check_size(text: bytes | str, budget: Budget) -> None:
    """Check a JSON text before it is parsed, which multiplies its bytes.

    :raises ValueError: if it is longer than the budget, or may hold more values.
    """
    if len(text) > budget.bytes:
        raise ValueError(f"it has more than {budget.bytes:,} bytes")
    signs = b",[{:" if isinstance(text, bytes) else ",[{:"
    nodes = 1 + sum(text.count(signs[i : i + 1]) for i in range(len(signs)))  # pyright: ignore[reportArgumentType]
    if nodes > budget.nodes:                                # there are at most as many
        raise ValueError(f"it has more than {budget.nodes:,} values")


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _check_depth(content: Any, limit: int) -> None:
    """:raises ValueError: if lists and objects are nested more deeply."""
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > limit:
            raise ValueError(f"it is nested more than {limit} levels deep")
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
