"""The images in a zip archive, such as EDM's dataset tool writes."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from cm.data.decode import IMAGE_BYTES
from cm.data.image_source import EncodedSource, Format
from cm.data.labels import LABEL_FILE, label_budget
from cm.errors import UserError
from cm.io import storage, untrusted

LOCAL_MAGIC, LOCAL_HEADER = b"PK\x03\x04", 30                        # a zip member's, before its name
NAME_BYTES = 128                                                     # usually enough for its name and extra fields


class ZipSource(EncodedSource):
    """The images in a zip archive.

    The directory of the archive is read once, when it is opened, and not again in workers, which are forked or get a
    copy. Each process opens the file for itself: a handle shared with a forked worker would share its position.
    """

    def __init__(self, data_dir: str, image_size: int, channels: int = 3):
        self._path = data_dir
        self._file: IO[bytes] | None = None
        self._opened_by = 0
        try:
            with untrusted.open_zip(self.file()) as archive:
                members = {member.filename: member for member in archive.infolist()}
                limit = label_budget(len(members)).bytes
                self._labels = {
                    name: untrusted.read_member(archive, name, limit) for name in members if name == LABEL_FILE
                }
        except untrusted.DAMAGE as error:
            raise UserError(f"{data_dir} is not a zip archive of images: {error}") from None
        super().__init__(data_dir, image_size, list(members), channels)
        ours = [members[name] for name in self._names]
        columns = ("header_offset", "compress_size", "file_size", "compress_type", "CRC")
        self._index = {column: np.array([getattr(member, column) for member in ours]) for column in columns}

    def file(self) -> IO[bytes]:
        """The open archive of this process."""
        file = self._file
        if file is None or self._opened_by != os.getpid():
            file = self._file = storage.open_file(self._path, random_access=True)
            self._opened_by = os.getpid()
        return file

    def read(self, name: str, limit: int = IMAGE_BYTES) -> bytes:
        """The content of a file.

        :raises KeyError: if the file is dataset.json and the archive has none.
        :raises ValueError: if there is no such image.
        """
        return self._labels[name] if name == LABEL_FILE else self.encoded(self._names.index(name))

    def encoded(self, i: int) -> bytes:
        """The bytes of the file of image i.

        :raises ValueError: if they are damaged, or too many.
        """
        start, size, full_size, kind, crc = (int(column[i]) for column in self._index.values())
        if max(size, full_size) > IMAGE_BYTES:
            raise ValueError(f"it has {max(size, full_size)} bytes, more than an image may have ({IMAGE_BYTES})")
        block = self._bytes_at(start, LOCAL_HEADER + NAME_BYTES + size)
        name_size, extra_size = block[26:28], block[28:30]          # the directory's may differ
        before = LOCAL_HEADER + int.from_bytes(name_size, "little") + int.from_bytes(extra_size, "little")
        if before > LOCAL_HEADER + NAME_BYTES:
            block = self._bytes_at(start, before + size)
        data = block[before : before + size]
        if kind == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, full_size + 1)   # no more than announced
        if block[:4] != LOCAL_MAGIC or zlib.crc32(data) != crc:
            raise ValueError("Bad CRC-32: its bytes are damaged")
        return data

    def _bytes_at(self, start: int, size: int) -> bytes:
        """These bytes of the archive, or fewer if it ends before."""
        if not storage.is_remote(self._path):
            return os.pread(self.file().fileno(), size, start)
        self.file().seek(start)
        return self.file().read(size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def first_names(path: str) -> Iterator[str]:
    """The name of the member at the front of an archive, read without its directory, and then those of all."""
    with storage.open_file(path, random_access=True) as file:
        front = file.read(LOCAL_HEADER + NAME_BYTES)
        if front[:4] == LOCAL_MAGIC:
            yield front[LOCAL_HEADER : LOCAL_HEADER + int.from_bytes(front[26:28], "little")].decode(errors="replace")
        try:
            yield from untrusted.open_zip(file).namelist()
        except untrusted.DAMAGE:
            return                                                  # whoever opens it says so


FORMAT = Format(lambda data_dir: data_dir.lower().endswith(".zip"), ZipSource, "a .zip")
