"""A large file of images that each process opens for itself and reads at any offset."""

from __future__ import annotations

import os
from typing import IO, Any

from cm.io import storage


class RandomAccessFile:
    """A local or remote file. A handle shared with a forked worker would share its position, so none is."""

    def __init__(self, path: str):
        self.path = path
        self._file: IO[bytes] | None = None
        self._opened_by = 0

    def file(self) -> IO[bytes]:
        """The open file of this process.

        :raises OSError, UserError: as `cm.io.storage.open_file`.
        """
        file = self._file
        if file is None or self._opened_by != os.getpid():
            file = self._file = storage.open_file(self.path, random_access=True)
            self._opened_by = os.getpid()
        return file

    def read_at(self, start: int, size: int) -> bytes:
        """These bytes, or fewer if the file ends before."""
        if not storage.is_remote(self.path):
            return os.pread(self.file().fileno(), size, start)
        self.file().seek(start)
        return self.file().read(size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
