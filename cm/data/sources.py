"""Where images come from: a folder, a zip, an npz, or the digits that come with scikit-learn.

A source answers for image i: its pixels, its class and its name for messages. How one is decoded is the business of
`pictures`; order, augmentation and batches that of `image_datasets`. Shapes: N images, H height, W width, S image_size.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cm.data.decode import (
    IMAGE_SUFFIXES,
    PICTURE_BYTES,
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
LOCAL_MAGIC, LOCAL_HEADER = b"PK\x03\x04", 30                        # of a member in a zip, before its name
NAME_ROOM = 128                                                     # bytes that its name and notes mostly fit in


class ImageSource:
    """N images; the kinds below say how one is loaded.

    `labels` is int64 [N], or None; then `no_labels` says why, naming the first image without a class.
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
        """Decode each image once a process if all together have so many bytes at most; what is in memory stays there.

        The system commits the memory only as it is filled.
        """
        size = self.image_size
        if self._cache is None and len(self) * size**2 * 3 <= limit_bytes:
            self._cache = np.empty((len(self), size, size, 3), np.uint8)
        elif self._cache is not None and not self._cached.any() and len(self) * size**2 * 3 > limit_bytes:
            self._cache = None

    @property
    def in_memory(self) -> bool:
        """Whether images cost next to nothing once each has been read."""
        return self._cache is not None

    @property
    def num_classes(self) -> int | None:
        """Largest label + 1; None without labels."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def label(self, i: int) -> int | None:
        return None if self.labels is None else int(self.labels[i])

    def name(self, i: int) -> str:
        raise NotImplementedError

    def load(self, i: int) -> Image.Image:
        """The whole picture, in RGB.

        :raises UserError: if it cannot be read; the message names it.
        """
        raise NotImplementedError

    def image(self, i: int) -> np.ndarray:
        """The largest central square of picture i at the size of the source: uint8 [S,S,3].

        :raises UserError: if it cannot be read; the message names it.
        """
        return self.images(np.array([i]))[0]

    def images(self, indices: np.ndarray) -> np.ndarray:
        """`image` for several at once: int64 [B] -> uint8 [B,S,S,3], the caller's to change."""
        if self._cache is None:
            return np.stack([centre_crop(self.load(i), self.image_size) for i in indices.tolist()])
        for i in indices[~self._cached[indices]].tolist():
            self._cache[i] = centre_crop(self.load(i), self.image_size)
            self._cached[i] = True
        return self._cache[indices]


# ---- pictures in files ----


class EncodedSource(ImageSource):
    """Pictures in a folder or an archive, decoded when they are asked for. Names are relative paths with slashes."""

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

    def name(self, i: int) -> str:
        return self._names[i]

    def load(self, i: int) -> Image.Image:
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
        """The file of picture i."""
        return self.read(self._names[i])

    def read(self, name: str, limit: int = PICTURE_BYTES) -> bytes:
        """The content of a file.

        :raises ValueError: if it has more than `limit` bytes; other errors of the store, if it cannot be read.
        """
        raise NotImplementedError


class FolderSource(EncodedSource):
    """The images of a folder and the folders in it."""

    def __init__(self, data_dir: str, image_size: int):
        super().__init__(data_dir, image_size, storage.files_under(data_dir))

    def read(self, name: str, limit: int = PICTURE_BYTES) -> bytes:
        path = f"{self.data_dir}/{name}"
        if not storage.is_remote(path):
            untrusted.demand_regular(path)
        with storage.open_file(path, random_access=True) as file:
            return untrusted.read_file(file, limit)


class ZipSource(EncodedSource):
    """The images in a zip archive.

    Where each image lies is read once, when the archive is opened, and not again in the workers that are forked or
    given a copy. Each process opens the file for itself: a handle shared with a forked worker would share its position.
    """

    def __init__(self, data_dir: str, image_size: int):
        self._path = data_dir
        self._file: BinaryIO | None = None
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

    def file(self) -> BinaryIO:
        if self._file is None or self._opened_by != os.getpid():
            self._file, self._opened_by = storage.open_file(self._path, random_access=True), os.getpid()
        return self._file

    def read(self, name: str, limit: int = PICTURE_BYTES) -> bytes:
        """:raises KeyError: if there is no such file."""
        return self._labels[name] if name == LABEL_FILE else self.encoded(self._names.index(name))

    def encoded(self, i: int) -> bytes:
        """:raises ValueError: if the bytes are damaged, or too many."""
        start, size, whole, kind, crc = (int(column[i]) for column in self._index.values())
        if max(size, whole) > PICTURE_BYTES:
            raise ValueError(f"it has {max(size, whole)} bytes, more than a picture may have ({PICTURE_BYTES})")
        block = self.bytes_at(start, LOCAL_HEADER + NAME_ROOM + size)
        name_size, extra_size = block[26:28], block[28:30]          # those of the directory may differ
        before = LOCAL_HEADER + int.from_bytes(name_size, "little") + int.from_bytes(extra_size, "little")
        if before > LOCAL_HEADER + NAME_ROOM:
            block = self.bytes_at(start, before + size)
        data = block[before : before + size]
        if kind == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, whole + 1)  # no more than was announced
        if block[:4] != LOCAL_MAGIC or zlib.crc32(data) != crc:
            raise ValueError("Bad CRC-32: its bytes are damaged")
        return data

    def bytes_at(self, start: int, size: int) -> bytes:
        """As many of these bytes of the archive as there are."""
        if not storage.is_remote(self._path):
            return os.pread(self.file().fileno(), size, start)
        self.file().seek(start)
        return self.file().read(size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


# ---- pictures in memory ----


class ArraySource(ImageSource):
    """Images in memory, uint8 [N,H,W,3]."""

    def __init__(self, data_dir: str, image_size: int, images: np.ndarray, labels: np.ndarray | None, no_labels: str):
        super().__init__(data_dir, image_size, len(images))
        self._images = images
        self.labels, self.no_labels = labels, no_labels
        if images.shape[1:3] == (image_size, image_size):
            self._cache, self._cached[:] = images, True

    def name(self, i: int) -> str:
        return f"{self.data_dir} image {i}"

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self._images[i])


def npz_source(data_dir: str, image_size: int) -> ArraySource:
    """A sample batch of guided-diffusion: `arr_0` uint8 [N,H,W,3] and, with classes, `arr_1` integers [N]."""
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


def digits_source(data_dir: str, image_size: int) -> ArraySource:
    """1797 handwritten digits of 8x8 pixels in 10 classes, from scikit-learn's own files."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn, which is not installed: pip install scikit-learn") from None
    grey, labels = load_digits(return_X_y=True)                     # [1797,64] in 0..16, [1797]
    grey = np.round(grey * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return ArraySource(data_dir, image_size, np.repeat(grey, 3, axis=3), labels.astype(np.int64), "")


# ---- which kind it is ----

SOURCES = {"digits": digits_source, "zip": ZipSource, "npz": npz_source, "folder": FolderSource}


def open_source(data_dir: str, image_size: int, flag: str = "--data_dir") -> ImageSource:
    """Open a set of images.

    The kind is read off `data_dir`, in this order: the word `digits`; a name that ends in `.zip` or `.npz`; else a
    folder (a folder called digits is `./digits`). Classes of folders and zips come from a `dataset.json` at their root,
    as EDM writes it, or else from file names `{class}_{anything}`, as guided-diffusion reads them.

    :param data_dir: the word, a path, or an address that blobfile can read, such as gs://bucket/images.
    :param image_size: pixels of a side of the images wanted.
    :param flag: what messages call data_dir.
    :raises UserError: if there is nothing of that name, it holds no images, or it is not what its name says.
    """
    if not data_dir:
        raise UserError(f"{flag} is empty: name a folder of images, a .zip, a .npz, or the word digits")
    if image_size < 1:
        raise UserError(f"--image_size {image_size}: images need at least one pixel")
    suffix = data_dir.lower().rpartition(".")[2]
    kind = data_dir if data_dir == "digits" else suffix if suffix in ("zip", "npz") else "folder"
    if kind != "digits":
        check_exists(data_dir, is_folder=kind == "folder", flag=flag)
    return SOURCES[kind](data_dir.rstrip("/") or "/", image_size)


def check_exists(path: str, is_folder: bool, flag: str) -> None:
    """:raises UserError: if there is nothing there, or a file for a folder, or the other way round."""
    if not storage.exists(path):
        raise UserError(f"{flag} {path} does not exist (looked for from {os.getcwd()})")
    if storage.is_directory(path) != is_folder:
        found, wanted = ("file", "a folder of images, a .zip or a .npz") if is_folder else ("folder", "a file")
        raise UserError(f"{flag} {path} is a {found}; expected {wanted}")
