"""Untrusted files: zip archives and arrays that may be damaged or malicious.

The size that a file declares is accepted only if the file has enough bytes for it, so the memory for reading is bounded
by the size on disk. Nothing in a file is ever executed: arrays hold plain numbers and text.
"""

from __future__ import annotations

import contextlib
import io
import math
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from cm.io.budget import CHUNK_BYTES, INFLATED

INFLATION = 1032
"""Bytes that a byte of deflate can stand for at most (RFC 1951: a match of 258 bytes takes two bits)."""
BOMB_RATIO = 100
"""A member beyond the budget is refused if packing made it smaller by more than that; pixels shrink far less."""
HEADER_BYTES = 2**16                                        # more than any npy header of one array has

HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
DAMAGE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
"""The exceptions of the readers below for a bad file; they raise no others."""


# --- zip archives ----------------------------------------------------------------------------------------------------


def open_zip(file: IO[bytes]) -> zipfile.ZipFile:
    """Open an archive, after a check that its members have harmless names and plausible sizes.

    :raises zipfile.BadZipFile: if it is none, is damaged, or has a member that is not so.
    """
    try:
        archive = zipfile.ZipFile(file)
        file.seek(0, io.SEEK_END)
        size = file.tell()
    except (MemoryError, zipfile.BadZipFile):
        raise
    except Exception as error:                              # broken directories raise many kinds
        raise zipfile.BadZipFile(str(error) or repr(error)) from None
    for info in archive.infolist():
        problem = rejection_reason(info, size)
        if problem:
            raise zipfile.BadZipFile(f"its member {shown(info.filename)} {problem}")
    if sum(info.compress_size for info in archive.infolist()) > size:
        raise zipfile.BadZipFile("its members overlap")
    return archive


class MemberFacts(Protocol):
    """The attributes of a member, such as a ZipInfo, that are checked."""

    @property
    def filename(self) -> str: ...
    @property
    def flag_bits(self) -> int: ...
    @property
    def external_attr(self) -> int: ...
    @property
    def compress_type(self) -> int: ...
    @property
    def compress_size(self) -> int: ...
    @property
    def file_size(self) -> int: ...


def rejection_reason(info: MemberFacts, archive_bytes: int) -> str:
    """The reason to reject a member; None if there is none."""
    if escapes(info.filename):
        return "leads out of the archive's own folder"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a symbolic link"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed otherwise than by deflate; pack it again with zip"
    most = info.compress_size if info.compress_type == zipfile.ZIP_STORED else INFLATION * info.compress_size + 64
    if info.compress_size > archive_bytes or info.file_size > most:
        return f"claims {info.file_size:,} bytes, more than the archive can hold"
    if info.file_size > INFLATED.bytes and info.file_size > BOMB_RATIO * info.compress_size:
        expands = f"would expand from {info.compress_size:,} to {info.file_size:,} bytes"
        return f"{expands}; pack it again without compression"
    return ""


def escapes(name: str) -> bool:
    """Whether a relative path with slashes, or a backslash of Windows, names something outside of its folder."""
    parts = name.replace("\\", "/").split("/")
    return not parts[0] or ".." in parts or parts[0].endswith(":") or "\0" in name


def shown(value: Any, limit: int = 100) -> str:
    """A value out of a file for a message, which it must not flood."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """The content of a member.

    :raises DAMAGE: if it cannot be read, or has more than `limit` bytes.
    """
    with open_member(archive, name) as (member, size):
        if size > limit:
            raise ValueError(f"it has {size:,} bytes, more than the {limit:,} that are taken")
        data = member.read(size)                            # with a number: without one, a lie would inflate first
        if len(data) < size:
            raise EOFError(f"{size - len(data)} bytes are missing")
        return data


@contextlib.contextmanager
def open_member(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], int]]:
    """A member as a stream, and the bytes it has when unpacked."""
    try:
        with archive.open(name) as member:
            yield member, archive.getinfo(name).file_size
    except (MemoryError, *DAMAGE):
        raise
    except (RuntimeError, KeyError, NotImplementedError, AttributeError) as error:      # of broken local headers
        raise zipfile.BadZipFile(str(error) or repr(error)) from None


# --- arrays ----------------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """The header of an npy file."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int                                             # of the first value
    missing: int                                            # bytes that the values need and the file has not


def read_header(stream: IO[bytes], size: int) -> Header:
    """Read the header of an npy file of `size` bytes, and leave the stream at the first value.

    :raises ValueError: if there is none.
    """
    front = io.BytesIO(stream.read(min(size, HEADER_BYTES)))
    try:
        shape, fortran_order, dtype = HEADER_READERS[np.lib.format.read_magic(front)](front)
    except Exception as error:                              # numpy's parser raises many kinds, for want of stack too
        raise ValueError(str(error) or repr(error)) from None
    if any(length < 0 for length in shape) or dtype.itemsize == 0:
        raise ValueError(f"{dtype} {list(shape)} cannot be an array")
    stream.seek(front.tell())
    return Header(shape, fortran_order, dtype, front.tell(), math.prod(shape) * dtype.itemsize + front.tell() - size)


def read_array(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of an npy file of `size` bytes.

    :raises ValueError: if it is none, holds Python objects or characters that do not exist, or is cut off.
    """
    header = read_header(stream, size)
    if header.dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded")
    if header.missing > 0:
        raise ValueError(f"{header.missing:,} of the {size - header.offset + header.missing:,} bytes of "
                         f"{header.dtype} {list(header.shape)} are missing")
    array = np.empty(header.shape, header.dtype, "F" if header.fortran_order else "C")
    values = array.reshape(-1, order="A")
    read_into(stream, values.view(np.uint8) if array.size else np.empty(0, np.uint8))
    if header.dtype.kind == "U" and array.size:
        numbers = values.view(np.dtype(np.uint32).newbyteorder(header.dtype.byteorder))
        if numbers.max() > sys.maxunicode:                  # of which Python would raise a SystemError
            raise ValueError(f"it holds the number {numbers.max():,} as a character")
    return array


def read_member_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """The array `key` of an npz.

    :raises DAMAGE: if it cannot be read.
    """
    with open_member(archive, f"{key}.npy") as (member, size):
        return read_array(member, size)


def read_into(stream: IO[bytes], values: np.ndarray) -> None:
    """Fill an array of bytes from a stream.

    :raises EOFError: if the stream ends before.
    """
    target = memoryview(values.data).cast("B")
    while target:
        count = stream.readinto(target[:CHUNK_BYTES])  # pyright: ignore[reportAttributeAccessIssue]: files have it
        if not count:
            raise EOFError(f"{len(target)} bytes are missing")
        target = target[count:]
