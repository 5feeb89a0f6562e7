"""What a source of images is: the pixels, the class and the name of image i of N.

`cm.data.formats` has a subclass for each format. Shapes: N images, H height, W width, C channels, S image_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cm.data.class_names import ClassNames
from cm.data.decode import IMAGE_BYTES, IMAGE_SUFFIXES, MODES, centre_crop, decode, why_unreadable
from cm.data.image_names import Found
from cm.data.labels import LABEL_FILE, Labels, label_budget, labels_of_json, labels_of_names
from cm.errors import UserError
from cm.io import untrusted

CACHE_BYTES = 256 * 2**20                                           # largest set that is kept decoded in memory


class ImageSource:
    """N images of C channels; the subclasses define how an image is loaded.

    `labels` is int64 [N], or None; then `no_labels` gives the reason and names the first image without a class.
    `class_names` are the names of the classes where they are known, `labels_from` says where the classes come from.
    `note` says what is done to images of other channels, if anything.
    """

    def __init__(self, data_dir: str, image_size: int, length: int, channels: int = 3):
        self.data_dir = data_dir
        self.image_size = image_size
        self.channels = channels
        self.note = ""
        self.labels: np.ndarray | None = None
        self.no_labels = self.labels_from = ""
        self.class_names: ClassNames = ()
        self._length = length
        self._keeps = False                                         # whether `_cache` is, or will be, there
        self._cache: np.ndarray | None = None
        self._cached = np.zeros(length, bool)
        self.keep_decoded(CACHE_BYTES)

    def __len__(self) -> int:
        return self._length

    def keep_decoded(self, limit_bytes: int) -> None:
        """Decode each image only once per process if all together have at most so many bytes; what is decoded stays.

        The memory is taken with the first image, and the operating system commits it only as it is filled.
        """
        if not self._cached.any():
            self._cache, self._keeps = None, len(self) * self._square_bytes <= limit_bytes

    @property
    def _square_bytes(self) -> int:
        return self.image_size**2 * self.channels * self._dtype.itemsize

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.holds_floats else np.uint8)

    @property
    def holds_floats(self) -> bool:
        """Whether its images are floats, which the network sees as they are, and not bytes."""
        return False

    @property
    def in_memory(self) -> bool:
        """Whether every image stays in memory once it has been read."""
        return self._keeps

    def take_labels(self, labels: Labels) -> None:
        """Give the images these classes."""
        self.labels, self.no_labels, self.class_names, self.labels_from = labels

    @property
    def num_classes(self) -> int | None:
        """The number of class names, or where these are not known the largest label + 1; None without labels."""
        return None if self.labels is None else len(self.class_names) or int(self.labels.max()) + 1

    def label(self, i: int) -> int | None:
        """The class of image i, None without labels."""
        return None if self.labels is None else int(self.labels[i])

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        raise NotImplementedError

    def load(self, i: int) -> Image.Image:
        """The complete image i in RGB or, with one channel, in grey (mode L).

        :raises UserError: if it cannot be read; the message names it.
        """
        raise NotImplementedError

    def image(self, i: int) -> np.ndarray:
        """The largest central square of image i at the size of the source: uint8 [S,S,C], or latents as float32.

        :raises UserError: if it cannot be read; the message names it.
        """
        return self.images(np.array([i]))[0]

    def images(self, indices: np.ndarray) -> np.ndarray:
        """`image` for several at once: int64 [B] -> [B,S,S,C], a copy that the caller may change."""
        if not self._keeps:
            return np.stack([self._square(i) for i in indices.tolist()])
        if self._cache is None:
            self._cache = np.empty((len(self), self.image_size, self.image_size, self.channels), self._dtype)
        for i in indices[~self._cached[indices]].tolist():
            self._cache[i] = self._square(i)
            self._cached[i] = True
        return self._cache[indices]

    def gather(self, indices: np.ndarray) -> None:
        """Make ready the images of a batch: nothing, where each can be read at any time."""

    def classes(self, indices: np.ndarray) -> np.ndarray:
        """The classes of these images, of a source that has `labels`: int64 [B]."""
        assert self.labels is not None, "whoever asks has checked it"
        return self.labels[indices]

    def _square(self, i: int) -> np.ndarray:
        size = self.image_size
        return centre_crop(self.load(i), size).reshape(size, size, self.channels)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was decoded, which another process decodes for itself."""
        return {**self.__dict__, "_cache": None, "_cached": np.zeros(len(self), bool)}


class EncodedSource(ImageSource):
    """Images in a folder or an archive, decoded on demand. Names are relative paths with slashes."""

    def __init__(self, data_dir: str, image_size: int, found: Found, channels: int = 3):
        if channels not in MODES:
            raise UserError(f"--channels {channels}: the image files of {data_dir} have 1 channel (grey) or 3; latents "
                            "of other channels are read from an npz with arr_0 [N,H,W,C]")
        names, self.has_label_file = found
        if not names:
            raise UserError(f"no images in {data_dir}: looked at every depth for {' '.join(IMAGE_SUFFIXES)}")
        super().__init__(data_dir, image_size, len(names), channels)
        if channels == 1:
            self.note = "read as grey: images in colour are converted to their luma"
        self._names = names
        if self.has_label_file:
            try:
                text = self.read(LABEL_FILE, label_budget(len(names)).bytes)
            except untrusted.DAMAGE as error:
                raise UserError(f"{data_dir}: {LABEL_FILE} cannot be read: {error}") from None
            self.take_labels(labels_of_json(text, names))
        else:
            self.take_labels(labels_of_names(names))

    def label_by(self, rule: str) -> None:
        """Take the classes by another rule than "auto", see `labels_of_names`; a dataset.json wins over each."""
        if not self.has_label_file:
            self.take_labels(labels_of_names(self._names, rule))

    def name(self, i: int) -> str:
        """The path of image i in the folder or archive."""
        return self._names[i]

    def load(self, i: int) -> Image.Image:
        """The complete image i in RGB or, with one channel, in grey (mode L).

        :raises UserError: if it cannot be read; the message names it.
        """
        try:
            image = decode(self.encoded(i))
            return image.convert(MODES[1]) if self.channels == 1 else image
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


class Format(NamedTuple):
    """A format of data sets."""

    claims: Callable[[str], bool]               # whether the name of a set is of this format
    open: Callable[..., Any]                    # from (data_dir, image_size, channels); of a stream, from (data_dir)
    what: str                                   # how messages call such a set
    on_disk: str = "file"                       # "file", "folder", "any" of both, or "no" place to look for
    is_stream: bool = False                     # whether it is opened as a `cm.data.streams.ImageStream`
    is_sent: bool = False                       # whether rank 0 opens it and sends it to the others, by pickle
