"""The directory of a zip archive as arrays, and the content of a member by its offset.

`zipfile` makes an object of half a kilobyte for every member, which a million images in every process cannot afford.
Here the directory is read block by block, and only columns of numbers stay. What `cm.io.untrusted` refuses is refused.
Names of fields and layout: PKWARE's APPNOTE.TXT, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, NamedTuple

import numpy as np

from cm.io import untrusted
from cm.io.budget import INFLATED
from cm.io.names import NameTable, spans

END = struct.Struct("<4s4H2LH")                                     # of the directory
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
COMMENT_BYTES = 2**16
HEADER = np.dtype([                                                 # of a member in the directory
    ("magic", "S4"), ("made_by", "<u2"), ("version", "u1"), ("reserved", "u1"), ("flag_bits", "<u2"),
    ("compress_type", "<u2"), ("time", "<u2"), ("date", "<u2"), ("crc", "<u4"), ("compress_size", "<u4"),
    ("file_size", "<u4"), ("name_bytes", "<u2"), ("extra_bytes", "<u2"), ("comment_bytes", "<u2"), ("disk", "<u2"),
    ("internal_attr", "<u2"), ("external_attr", "<u4"), ("header_offset", "<u4"),
])
MAGIC = b"PK\x01\x02"
BLOCK_BYTES = 2**20                                                 # more than the longest header of a member
NEWEST_VERSION = 63                                                 # of the format, times ten
UTF8_NAME = 0x800
IN_EXTRA = 2**32 - 1                                                # the number stands in the extra field instead
FAR = 2**62                                                         # larger numbers are forged; int64 holds the others
WIDE = ("file_size", "compress_size", "header_offset")              # in the order of the extra field
LOCAL_MAGIC, LOCAL_BYTES = b"PK\x03\x04", 30                        # before a member's content, without its name
NAME_BYTES = 128                                                    # usually enough for its name and extra fields
AT_ONCE_BYTES = 2**22

ReadAt = Callable[[int, int], bytes]                                # (start, size) -> these bytes, fewer at the end


class Member(NamedTuple):
    """The position, sizes and kind of a member."""

    header_offset: int
    compress_size: int
    file_size: int
    compress_type: int
    crc: int


class ZipDirectory(NamedTuple):
    """The members of an archive, in the order of its directory: their names, and columns of `Member`."""

    names: NameTable
    columns: dict[str, np.ndarray]

    def take(self, rows: np.ndarray) -> ZipDirectory:
        """The members of these rows, int64 [M]."""
        return ZipDirectory(self.names.take(rows), {name: column[rows] for name, column in self.columns.items()})

    def member(self, i: int) -> Member:
        """Member i."""
        return Member(*(int(self.columns[name][i]) for name in Member._fields))


class _Place(NamedTuple):
    """The position of the directory; `before` is the number of bytes in front of the archive."""

    start: int
    size: int
    before: int


class _Facts(NamedTuple):
    """What `untrusted.rejection_reason` asks of a member."""

    filename: str
    flag_bits: int
    external_attr: int
    compress_type: int
    compress_size: int
    file_size: int


# --- the directory ---------------------------------------------------------------------------------------------------


def read_directory(file: IO[bytes]) -> ZipDirectory:
    """The directory of an archive, after a check that its members have harmless names and plausible sizes.

    :raises zipfile.BadZipFile: if it is none, is damaged, or has a member that is not so.
    """
    size = file.seek(0, io.SEEK_END)
    place = _find_directory(file, size)
    file.seek(place.start)
    tables, left, rest = [], place.size, b""
    parts: list[dict[str, np.ndarray]] = []
    while left > 0:
        read = file.read(min(BLOCK_BYTES, left))
        left = left - len(read) if read else 0
        block = rest + read
        starts, used = _members_in(block)
        rest = block[used:]
        if len(starts):
            headers = _headers_at(block, starts)
            tables.append(_names_of(block, starts, headers))
            wide = _columns_of(block, starts, headers)
            _check(headers, tables[-1], wide, size)
            parts.append({name: _compact(column) for name, column in wide.items()})
    if rest:
        raise zipfile.BadZipFile("Truncated central directory")
    columns: dict[str, np.ndarray] = {
        name: np.concatenate([part[name] for part in parts] or [np.empty(0, np.uint8)]) for name in Member._fields
    }
    if columns["compress_size"].sum(dtype=np.float64) > size:
        raise zipfile.BadZipFile("its members overlap")
    if place.before:
        columns["header_offset"] = columns["header_offset"].astype(np.int64) + place.before
    return ZipDirectory(NameTable.joined(tables), columns)


def _compact(column: np.ndarray) -> np.ndarray:
    """The same numbers, none of them negative, in as few bytes as they fit in."""
    return column.astype(np.min_scalar_type(int(column.max(initial=0))))


def _find_directory(file: IO[bytes], size: int) -> _Place:
    """:raises zipfile.BadZipFile: if there is no end of a directory, or it names an impossible position."""
    tail_start = max(size - COMMENT_BYTES - END.size, 0)
    file.seek(tail_start)
    tail = file.read()
    at = len(tail) - END.size                                       # without a comment, the usual place
    if at < 0 or tail[at : at + 4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + END.size:
        raise zipfile.BadZipFile("File is not a zip file")
    *_, directory_bytes, offset, _ = END.unpack_from(tail, at)
    end = tail_start + at
    if (wide := _wide_end(file, end)) is not None:
        directory_bytes, offset = wide
        end -= END64.size + END64_LOCATOR.size
    start = end - directory_bytes
    if start < 0:
        raise zipfile.BadZipFile("Bad offset for central directory")
    return _Place(start, directory_bytes, start - offset)


def _wide_end(file: IO[bytes], end: int) -> tuple[int, int] | None:
    """The size and the offset of the directory of an archive beyond 4 GiB or 65,535 members, None of a smaller one.

    :raises zipfile.BadZipFile: if it is one part of several.
    """
    start = end - END64_LOCATOR.size - END64.size
    if start < 0:
        return None
    file.seek(start)
    data = file.read(END64.size + END64_LOCATOR.size)
    magic, disk, _, disks = END64_LOCATOR.unpack_from(data, END64.size)
    if magic != b"PK\x06\x07":
        return None
    if disk != 0 or disks > 1:
        raise zipfile.BadZipFile("zipfiles that span multiple disks are not supported")
    magic, *_, directory_bytes, offset = END64.unpack_from(data)
    return (directory_bytes, offset) if magic == b"PK\x06\x06" else None


def _members_in(block: bytes) -> tuple[np.ndarray, int]:
    """Where the complete members of a block begin, int64 [M], and where the last of them ends.

    Each entry gives the start of the next one, and each starts with MAGIC. If every MAGIC of the block is at the start
    that the entry before gives, these are all members, and no loop is needed.

    :raises zipfile.BadZipFile: if one does not begin as it must.
    """
    data = np.frombuffer(block, np.uint8)
    found = np.flatnonzero(data[: max(len(data) - HEADER.itemsize + 1, 0)] == MAGIC[0])
    for i in range(1, len(MAGIC)):
        found = found[data[found + i] == MAGIC[i]]
    headers = _headers_at(block, found)
    ends = found + HEADER.itemsize + sum(headers[field].astype(np.int64) for field in (
        "name_bytes", "extra_bytes", "comment_bytes"))
    if not len(found) or found[0] != 0 or not np.array_equal(found[1:], ends[:-1]):
        found, ends = _followed(found, ends)
    stop = int(ends[-1]) if len(ends) else 0
    complete = ends <= len(block)
    used = int(ends[complete][-1]) if complete.any() else 0
    if stop == used and block[used : used + 4] != MAGIC[: len(block) - used]:
        raise zipfile.BadZipFile("Bad magic number for central directory")
    return found[complete], used


def _followed(found: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the beginnings that the first byte leads to, one after the other."""
    next_of, chain = dict(zip(found.tolist(), ends.tolist())), [0]
    while chain[-1] in next_of:
        chain.append(next_of[chain[-1]])
    return np.array(chain[:-1], np.int64), np.array(chain[1:], np.int64)


def _headers_at(block: bytes, starts: np.ndarray) -> np.ndarray:
    """The headers of members, HEADER [M]."""
    if not len(starts):
        return np.empty(0, HEADER)
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(block, np.uint8), HEADER.itemsize)
    return windows[starts].view(HEADER)[:, 0]


def _names_of(block: bytes, starts: np.ndarray, headers: np.ndarray) -> NameTable:
    """The names, as zipfile reads them.

    :raises zipfile.BadZipFile: if one is not in the encoding that it claims.
    """
    lengths = headers["name_bytes"].astype(np.int64)
    text = np.frombuffer(block, np.uint8)[spans(starts + HEADER.itemsize, lengths)]
    names = NameTable(text, np.cumsum(lengths))
    if text.max(initial=0) < 128 and text.min(initial=1) > 0:
        return names
    try:
        encodings = np.where(headers["flag_bits"] & UTF8_NAME, "utf-8", "cp437").tolist()
        decoded = (name.decode(encoding) for name, encoding in zip(names.each_encoded(), encodings))
        return NameTable.of(name.partition("\0")[0].encode() for name in decoded)
    except UnicodeDecodeError as error:
        raise zipfile.BadZipFile(str(error)) from None


def _columns_of(block: bytes, starts: np.ndarray, headers: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `Member`, int64 [M].

    :raises zipfile.BadZipFile: if an extra field that is needed is damaged.
    """
    columns = {name: headers[name].astype(np.int64) for name in Member._fields}
    missing = np.stack([columns[name] == IN_EXTRA for name in WIDE], 1)         # [M,3]
    rows = np.flatnonzero(missing.any(1))
    if not len(rows):
        return columns
    begins = starts[rows] + HEADER.itemsize + headers["name_bytes"][rows]
    sizes, needed = headers["extra_bytes"][rows].astype(np.int64), missing[rows]
    numbers, is_read = _first_extra(block, begins, sizes, needed)
    for i in np.flatnonzero(~is_read).tolist():
        extra = block[begins[i] : begins[i] + sizes[i]]
        numbers[i] = _searched_extra(extra, needed[i].tolist())
    for column, name in enumerate(WIDE):
        here = needed[:, column]
        columns[name][rows[here]] = numbers[here, column]
    return columns


def _first_extra(
    block: bytes, begins: np.ndarray, sizes: np.ndarray, needed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The wide numbers of members that have them at the front of their extra field: int64 [R,3], and of which members
    they could be read, bool [R].
    """
    data = np.frombuffer(block + bytes(32), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(data, 28)[begins]        # [R,28]
    kind, length = windows[:, :4].copy().view("<u2").T
    values = np.minimum(windows[:, 4:].copy().view("<u8"), FAR).astype(np.int64)  # [R,3], those needed at the front
    is_read = (kind == 1) & (length >= 8 * needed.sum(1)) & (length + 4 <= sizes)
    order = np.maximum(np.cumsum(needed, 1) - 1, 0)
    return np.take_along_axis(values, order, 1), is_read


def _searched_extra(extra: bytes, needed: list[bool]) -> list[int]:
    """The wide numbers of one member, wherever in its extra field they stand; IN_EXTRA if they stand nowhere.

    :raises zipfile.BadZipFile: if it is damaged.
    """
    numbers = [IN_EXTRA] * 3
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if length + 4 > len(extra):
            raise zipfile.BadZipFile(f"Corrupt extra field {kind:04x} (size={length})")
        if kind == 1:
            if length < 8 * sum(needed):
                raise zipfile.BadZipFile("Corrupt zip64 extra field")
            values = iter(struct.unpack_from(f"<{sum(needed)}Q", extra, 4))
            numbers = [min(next(values), FAR) if is_needed else IN_EXTRA for is_needed in needed]
        extra = extra[length + 4 :]
    return numbers


def _check(headers: np.ndarray, names: NameTable, columns: dict[str, np.ndarray], size: int) -> None:
    """:raises zipfile.BadZipFile: naming the first member that is not acceptable in an archive of `size` bytes."""
    if (headers["version"] > NEWEST_VERSION).any():
        raise zipfile.BadZipFile(f"zip file version {headers['version'].max() / 10:.1f}")
    for i in np.flatnonzero(_suspects(headers, names, columns, size)).tolist():
        fields = {name: int(headers[name][i]) for name in ("flag_bits", "external_attr")}
        sizes = {name: int(columns[name][i]) for name in ("compress_type", "compress_size", "file_size")}
        problem = untrusted.rejection_reason(_Facts(names[i], **fields, **sizes), size)
        if problem:
            raise zipfile.BadZipFile(f"its member {untrusted.shown(names[i])} {problem}")


def _suspects(headers: np.ndarray, names: NameTable, columns: dict[str, np.ndarray], size: int) -> np.ndarray:
    """Which members may be unacceptable: bool [M], true for all that are, and for few others."""
    packed, unpacked, kind = (columns[name] for name in ("compress_size", "file_size", "compress_type"))
    is_known = (kind == zipfile.ZIP_STORED) | (kind == zipfile.ZIP_DEFLATED)
    most = np.where(kind == zipfile.ZIP_STORED, packed, untrusted.INFLATION * packed)
    swells = (packed > size) | (unpacked > most) | (unpacked > INFLATED.bytes)
    is_link = headers["external_attr"] >> 28 == 0o12                # the kind of a file in Unix' mode
    return _may_escape(names) | is_link | (headers["flag_bits"] & 1 == 1) | ~is_known | swells


def _may_escape(names: NameTable) -> np.ndarray:
    """Whether `untrusted.escapes` may say so: bool [M], also of some harmless names with two dots or a colon."""
    text, lengths = names.text, names.lengths
    is_dot = text == ord(".")
    marks = (text == ord(":")) | (text == 0)
    marks[:-1] |= is_dot[:-1] & is_dot[1:]
    found = lengths == 0
    found[names.rows_at(np.flatnonzero(marks))] = True
    filled = np.flatnonzero(lengths)
    found[filled] |= np.isin(text[names.starts[filled]], np.frombuffer(b"/\\", np.uint8))
    return found


# --- the members -----------------------------------------------------------------------------------------------------


def content_start(read_at: ReadAt, header_offset: int) -> int:
    """Where the content of a member begins.

    :raises zipfile.BadZipFile: if no member is there.
    """
    header = read_at(header_offset, LOCAL_BYTES)
    if header[:4] != LOCAL_MAGIC or len(header) < LOCAL_BYTES:
        raise zipfile.BadZipFile("Bad magic number for file header")
    return header_offset + LOCAL_BYTES + _variable_bytes(header)


def read_content(read_at: ReadAt, member: Member) -> bytes:
    """The content of a member; of a small one in one access, unless its name is long.

    :raises ValueError: if it is damaged.
    :raises zlib.error: if it cannot be unpacked.
    """
    size, start = member.compress_size, member.header_offset
    block = read_at(start, LOCAL_BYTES + NAME_BYTES + min(size, AT_ONCE_BYTES))
    before = LOCAL_BYTES + _variable_bytes(block)
    data = block[before : before + size]
    if before + size > LOCAL_BYTES + NAME_BYTES + AT_ONCE_BYTES or before > LOCAL_BYTES + NAME_BYTES:
        data = read_at(start + before, size)                        # without a copy behind the header
    if member.compress_type == zipfile.ZIP_DEFLATED:                # no more than announced
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.file_size + 1)
    if block[:4] != LOCAL_MAGIC or zlib.crc32(data) != member.crc:
        raise ValueError("Bad CRC-32: its bytes are damaged")
    return data


def _variable_bytes(header: bytes) -> int:
    """Bytes of the name and the extra field that follow a member's local header; the directory's may differ."""
    return int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
