"""Untrusted files written by torch.save, read as tensors and plain values within bounds."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import torch as th
from torch import Tensor

from cm.io import untrusted
from cm.io.budget import PICKLE
from cm.io.pickle_scan import scan

ZIP_MAGIC = b"PK\3\4"
LEGACY_PICKLES = 5                              # at the front of an older file: two numbers, the machine, content, keys
SLACK_BYTES = 2**16
SHARED = 8
"""Factor by which tensors may be larger than their file: tied weights share their bytes in it."""


def load(stream: IO[bytes], size: int, map_location: Any = "cpu", verify: bool = False) -> Any:
    """What `torch.save` wrote to a file of `size` bytes. No code in it is executed.

    :param verify: compare the parts of the archive with its checksums; older files have none.
    :raises Exception: of many kinds, for a damaged or forged file.
    """
    start = stream.read(len(ZIP_MAGIC))
    stream.seek(0)
    unpacked = _check_archive(stream, size, verify) if start == ZIP_MAGIC else _check_legacy(stream, size)
    stream.seek(0)
    loaded = th.load(stream, map_location=map_location, weights_only=True)
    check_extent(loaded, unpacked)
    return loaded


def _check_archive(stream: IO[bytes], size: int, verify: bool) -> int:
    """Its bytes when unpacked.

    :raises DAMAGE: for an archive that would unpack to much more than it is, or whose pickle asks for too much.
    """
    archive = untrusted.open_zip(stream)
    names = [name.lower() for name in archive.namelist()]   # torch looks names up without regard to their case
    if len(set(names)) < len(names):
        raise zipfile.BadZipFile("it has two members of one name")
    total = sum(info.file_size for info in archive.infolist())
    if total > SLACK_BYTES + SHARED * size:                 # torch packs without compression
        raise zipfile.BadZipFile(f"it would expand from {size:,} to {total:,} bytes")
    for name in archive.namelist():
        if name.lower().endswith("data.pkl"):
            scan(io.BytesIO(untrusted.read_member(archive, name, PICKLE.bytes)))
    if verify and (damaged := archive.testzip()):
        raise zipfile.BadZipFile(f"its part {untrusted.shown(damaged)} does not match its own checksum "
                                 "(--verify_weights False loads it without this check)")
    return total


def _check_legacy(stream: IO[bytes], size: int) -> int:
    """Its bytes.

    :raises ValueError: for a file of several pickles that ask for too much, or for more bytes than there are.
    """
    for _ in range(LEGACY_PICKLES):
        for reference in scan(stream):
            numbers = [value for value in reference if isinstance(value, int)] if isinstance(reference, tuple) else []
            if max(numbers, default=0) > size:
                raise ValueError(f"it declares {max(numbers):,} numbers, and has {size:,} bytes")
    return size


def check_extent(content: Any, file_bytes: int) -> None:
    """Refuse views that repeat their values very often: a copy of such a tensor would take all memory.

    :raises ValueError: if the tensors are much larger than the file they come from.
    """
    total, seen, waiting = 0, set(), [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, (Mapping, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, Mapping) else item)
    if total > SHARED * file_bytes:
        raise ValueError(f"its tensors would take {total:,} bytes, the file has only {file_bytes:,}")
