"""The images in a zip archive, such as EDM's dataset tool writes."""

from __future__ import annotations

from collections.abc import Iterator

from cm.data.decode import IMAGE_BYTES
from cm.data.image_names import Found, image_rows
from cm.data.image_source import EncodedSource, Format
from cm.data.labels import LABEL_FILE
from cm.data.random_access import RandomAccessFile
from cm.errors import UserError
from cm.io import untrusted
from cm.io.zip_directory import LOCAL_BYTES, LOCAL_MAGIC, Member, ZipDirectory, read_content, read_directory

NAME_BYTES = 128                                                    # usually enough for a name


class ZipSource(EncodedSource):
    """The images in a zip archive.

    The directory of the archive is read once, when it is opened, and not again in workers or other ranks, which get
    the places of the images as arrays.
    """

    def __init__(self, data_dir: str, image_size: int, channels: int = 3):
        self.archive = RandomAccessFile(data_dir)
        try:
            self._places, self._label_file = _images_and_labels(read_directory(self.archive.file()))
        except untrusted.DAMAGE as error:
            raise UserError(f"{data_dir} is not a zip archive of images: {error}") from None
        super().__init__(data_dir, image_size, Found(self._places.names, self._label_file is not None), channels)

    def read(self, name: str, limit: int = IMAGE_BYTES) -> bytes:
        """The content of a file.

        :raises KeyError: if the file is dataset.json and the archive has none.
        :raises ValueError: if there is no such image, it has more than `limit` bytes, or is damaged.
        """
        if name != LABEL_FILE:
            return self.encoded(self._names.index(name))
        if self._label_file is None:
            raise KeyError(name)
        if self._label_file.file_size > limit:
            raise ValueError(f"it has {self._label_file.file_size:,} bytes, more than the {limit:,} that are taken")
        return read_content(self.archive.read_at, self._label_file)

    def encoded(self, i: int) -> bytes:
        """The bytes of the file of image i.

        :raises ValueError: if they are damaged, or too many.
        """
        member = self._places.member(i)
        size = max(member.compress_size, member.file_size)
        if size > IMAGE_BYTES:
            raise ValueError(f"it has {size} bytes, more than an image may have ({IMAGE_BYTES})")
        return read_content(self.archive.read_at, member)


def _images_and_labels(directory: ZipDirectory) -> tuple[ZipDirectory, Member | None]:
    """The images (or, without any, the arrays) in order, and the last dataset.json, if there is one."""
    rows = directory.names.rows_named(LABEL_FILE.encode())
    return directory.take(image_rows(directory.names)), directory.member(rows[-1]) if len(rows) else None


def first_names(path: str) -> Iterator[str]:
    """The name of the member at the front of an archive, read without its directory, and then those of all."""
    file = RandomAccessFile(path)
    front = file.read_at(0, LOCAL_BYTES + NAME_BYTES)
    if front[:4] == LOCAL_MAGIC:
        yield front[LOCAL_BYTES : LOCAL_BYTES + int.from_bytes(front[26:28], "little")].decode(errors="replace")
    try:
        yield from read_directory(file.file()).names
    except untrusted.DAMAGE:
        return                                                      # whoever opens it says so


FORMAT = Format(lambda data_dir: data_dir.lower().endswith(".zip"), ZipSource, "a .zip", is_sent=True)
