"""Sources of images: a folder, a zip, an npz, or the digits that come with scikit-learn.

A source gives the pixels, the class and the name of image i. `cm.data.decode` decodes the files; `cm.data.loader` makes
the order, the augmentation and the batches. Shapes: N images, H height, W width, S image_size.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import IO, Any

import numpy as np
from PIL import Image

from cm.data.decode import (
    IMAGE_BYTES,
    IMAGE_SUFFIXES,
    centre_crop,
    check_aspect,
    decode,
    images_among,
    why_unreadable,
)
from cm.data.labels import LABEL_FILE, MAX_CLASSES, label_bytes, labels_of_json, labels_of_names
from cm.errors import UserError
from cm.io import storage, untrusted

CACHE_BYTES = 256 * 2**20                                           # largest set that is kept decoded in memory
LOCAL_MAGIC, LOCAL_HEADER = b"PK\x03\x04", 30                        # a zip member's, before its name
NAME_BYTES = 128                                                     # usually enough for its name and extra fields


class ImageSource:
    """N images; the subclasses define how an image is loaded.

    `labels` is int64 [N], or None; then `no_labels` gives the reason and names the first image without a class.
    """

    def __init__(self, data_dir: str, image_size: int, length: int):
        self.data_dir = data_dir
        self.image_size = image_size
        self.labels: np.ndarray | None = None
        self.no_labels = ""
        self._length = length
        self._cache: np.ndarray | None = None
        self._cached = np.zeros(length, bool)
        self.keep_decoded(CACHE_BYTES)

    def __len__(self) -> int:
        return self._length

    def keep_decoded(self, limit_bytes: int) -> None:
        """Decode each image only once per process if all together have at most so many bytes; what is decoded stays.

        The operating system commits the memory only as it is filled.
        """
        size = self.image_size
        if self._cache is None and len(self) * size**2 * 3 <= limit_bytes:
            self._cache = np.empty((len(self), size, size, 3), np.uint8)
        elif self._cache is not None and not self._cached.any() and len(self) * size**2 * 3 > limit_bytes:
            self._cache = None

    @property
    def in_memory(self) -> bool:
        """Whether every image stays in memory once it has been read."""
        return self._cache is not None

    @property
    def num_classes(self) -> int | None:
        """Largest label + 1; None without labels."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def label(self, i: int) -> int | None:
        """The class of image i, None without labels."""
        return None if self.labels is None else int(self.labels[i])

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        raise NotImplementedError

    def load(self, i: int) -> Image.Image:
        """The complete image i in RGB.

        :raises UserError: if it cannot be read; the message names it.
        """
        raise NotImplementedError

    def image(self, i: int) -> np.ndarray:
        """The largest central square of image i at the size of the source: uint8 [S,S,3].

        :raises UserError: if it cannot be read; the message names it.
        """
        return self.images(np.array([i]))[0]

    def images(self, indices: np.ndarray) -> np.ndarray:
        """`image` for several at once: int64 [B] -> uint8 [B,S,S,3], a copy that the caller may change."""
        if self._cache is None:
            return np.stack([centre_crop(self.load(i), self.image_size) for i in indices.tolist()])
        for i in indices[~self._cached[indices]].tolist():
            self._cache[i] = centre_crop(self.load(i), self.image_size)
            self._cached[i] = True
        return self._cache[indices]


# ---- images in files ----


class EncodedSource(ImageSource):
    """Images in a folder or an archive, decoded on demand. Names are relative paths with slashes."""

    def __init__(self, data_dir: str, image_size: int, files: list[str]):
        names = images_among(files)
        if not names:
            raise UserError(f"no images in {data_dir}: looked at every depth for {' '.join(IMAGE_SUFFIXES)}")
        super().__init__(data_dir, image_size, len(names))
        self._names = names
        if LABEL_FILE in files:
            try:
                text = self.read(LABEL_FILE, label_bytes(len(names)))
            except untrusted.DAMAGE as error:
                raise UserError(f"{data_dir}: {LABEL_FILE} cannot be read: {error}") from None
            self.labels, self.no_labels = labels_of_json(text, names)
        else:
            self.labels, self.no_labels = labels_of_names(names)
        self.has_label_file = LABEL_FILE in files

    def label_by(self, rule: str) -> None:
        """Take the classes by another rule than "auto", see `labels_of_names`; a dataset.json wins over each."""
        if not self.has_label_file:
            self.labels, self.no_labels = labels_of_names(self._names, rule)

    def name(self, i: int) -> str:
        """The path of image i in the folder or archive."""
        return self._names[i]

    def load(self, i: int) -> Image.Image:
        """The complete image i in RGB.

        :raises UserError: if it cannot be read; the message names it.
        """
        try:
            return decode(self.encoded(i))
        except MemoryError:
            raise
        except Exception as error:                                  # decoders and archives raise many kinds
            raise UserError(
                f"{self.data_dir}: image {i} ({self._names[i]}) cannot be read: {why_unreadable(error)}. "
                "Replace or remove it."
            ) from error

    def encoded(self, i: int) -> bytes:
        """The bytes of the file of image i."""
        return self.read(self._names[i])

    def read(self, name: str, limit: int = IMAGE_BYTES) -> bytes:
        """The content of a file.

        :raises ValueError: if it has more than `limit` bytes. Other errors of the storage are passed on.
        """
        raise NotImplementedError


class FolderSource(EncodedSource):
    """The images of a folder and the folders in it."""

    def __init__(self, data_dir: str, image_size: int):
        super().__init__(data_dir, image_size, storage.files_under(data_dir))

    def read(self, name: str, limit: int = IMAGE_BYTES) -> bytes:
        """The content of a file, see `EncodedSource.read`."""
        path = f"{self.data_dir}/{name}"
        if not storage.is_remote(path):
            untrusted.demand_regular(path)
        with storage.open_file(path, random_access=True) as file:
            return untrusted.read_file(file, limit)


class ZipSource(EncodedSource):
    """The images in a zip archive.

    The directory of the archive is read once, when it is opened, and not again in workers, which are forked or get a
    copy. Each process opens the file for itself: a handle shared with a forked worker would share its position.
    """

    def __init__(self, data_dir: str, image_size: int):
        self._path = data_dir
        self._file: IO[bytes] | None = None
        self._opened_by = 0
        try:
            with untrusted.open_zip(self.file()) as archive:
                members = {member.filename: member for member in archive.infolist()}
                limit = label_bytes(len(members))
                self._labels = {
                    name: untrusted.read_member(archive, name, limit) for name in members if name == LABEL_FILE
                }
        except untrusted.DAMAGE as error:
            raise UserError(f"{data_dir} is not a zip archive of images: {error}") from None
        super().__init__(data_dir, image_size, list(members))
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


# ---- images in memory ----


class ArraySource(ImageSource):
    """Images in memory, uint8 [N,H,W,3]."""

    def __init__(self, data_dir: str, image_size: int, images: np.ndarray, labels: np.ndarray | None, no_labels: str):
        super().__init__(data_dir, image_size, len(images))
        self._images = images
        self.labels, self.no_labels = labels, no_labels
        if images.shape[1:3] == (image_size, image_size):
            self._cache, self._cached[:] = images, True

    def name(self, i: int) -> str:
        """The file and the number of the image."""
        return f"{self.data_dir} image {i}"

    def load(self, i: int) -> Image.Image:
        """The complete image i in RGB."""
        return Image.fromarray(self._images[i])


def _npz_source(data_dir: str, image_size: int) -> ArraySource:
    """A sample batch of guided-diffusion: `arr_0` uint8 [N,H,W,3] and, with classes, `arr_1` integers [N].

    :raises UserError: if the file holds something else.
    """
    try:
        with storage.open_file(data_dir, random_access=True) as file, untrusted.open_zip(file) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            arrays = {key: untrusted.read_member_array(archive, key) for key in ("arr_0", "arr_1") if key in found}
    except untrusted.DAMAGE as error:
        raise UserError(f"{data_dir} is not an npz of plain arrays: {error}") from None
    if "arr_0" not in arrays:
        raise UserError(f"{data_dir} has no images: expected arr_0, found {', '.join(found[:20]) or 'nothing'}")
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8 or not images.size:
        raise UserError(
            f"{data_dir}: arr_0 is {images.dtype} {list(images.shape)}; images must be uint8 [N,H,W,3] or [N,H,W,1]"
        )
    try:
        check_aspect(*images.shape[1:3])
    except ValueError as error:
        raise UserError(f"{data_dir}: {error}") from None
    images = np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))
    if labels is None:
        return ArraySource(data_dir, image_size, images, None, "it has no arr_1, so already image 0 has no class")
    fits = labels.shape == (len(images),) and labels.dtype.kind in "iu"
    if not fits or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        reason = f"arr_1 is {labels.dtype} {list(labels.shape)}, not one class number for each of {len(images)} images"
        return ArraySource(data_dir, image_size, images, None, reason)
    return ArraySource(data_dir, image_size, images, labels.astype(np.int64), "")


def _digits_source(data_dir: str, image_size: int) -> ArraySource:
    """1797 handwritten digits of 8x8 pixels in 10 classes, from scikit-learn's own files.

    :raises UserError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn, which is not installed: pip install scikit-learn") from None
    grey, labels = load_digits(return_X_y=True)                     # [1797,64] in 0..16, [1797]
    grey = np.round(grey * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return ArraySource(data_dir, image_size, np.repeat(grey, 3, axis=3), labels.astype(np.int64), "")


# ---- choosing the source ----

SOURCES = {"digits": _digits_source, "zip": ZipSource, "npz": _npz_source, "folder": FolderSource}


def open_source(data_dir: str, image_size: int, flag: str = "--data_dir", labels: str = "auto") -> ImageSource:
    """Open a set of images.

    `data_dir` decides the kind, in this order: the word `digits`; a name that ends in `.zip` or `.npz`; else a
    folder (a folder called digits is `./digits`). Classes of folders and zips come from a `dataset.json` at their root,
    as EDM writes it, or else from sub-folders where there are several, or else from file names `{class}_{anything}`.

    :param data_dir: the word, a path, or a URL that blobfile can read, such as gs://bucket/images.
    :param image_size: side of the square images in pixels.
    :param flag: the name of data_dir in messages.
    :param labels: "folders" or "names" for one of these rules alone, see `cm.data.labels.RULES`.
    :raises UserError: if there is nothing of that name, it holds no images, or its content does not fit its name.
    """
    if not data_dir:
        raise UserError(f"{flag} is empty: name a folder of images, a .zip, a .npz, or the word digits")
    if image_size < 1:
        raise UserError(f"--image_size {image_size}: images need at least one pixel")
    suffix = data_dir.lower().rpartition(".")[2]
    kind = data_dir if data_dir == "digits" else suffix if suffix in ("zip", "npz") else "folder"
    if kind != "digits":
        _check_exists(data_dir, is_folder=kind == "folder", flag=flag)
    source = SOURCES[kind](data_dir.rstrip("/") or "/", image_size)
    if labels != "auto" and isinstance(source, EncodedSource):
        source.label_by(labels)
    return source


def _check_exists(path: str, is_folder: bool, flag: str) -> None:
    """:raises UserError: if there is nothing, or a file instead of a folder, or a folder instead of a file."""
    if not storage.exists(path):
        raise UserError(f"{flag} {path} does not exist (looked for from {os.getcwd()})")
    if storage.is_directory(path) != is_folder:
        found, wanted = ("file", "a folder of images, a .zip or a .npz") if is_folder else ("folder", "a file")
        raise UserError(f"{flag} {path} is a {found}; expected {wanted}")
