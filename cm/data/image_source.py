"""The interface of a source of images: the pixels, the class and the name of image i of N.

`cm.data.formats` has a subclass for each format. Shapes: N images, H height, W width, C channels, S image_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cm.data.class_names import ClassNames
from cm.data.decode import IMAGE_BYTES, IMAGE_SUFFIXES, MODES, centre_crop, decode, why_unreadable
from cm.data.image_names import Found
from cm.data.labels import LABEL_FILE, Labels, label_budget, labels_of_json, labels_of_names
from cm.data.latents import LatentRecord, moments_of, record_of_json
from cm.errors import UserError
from cm.io import untrusted

CACHE_BYTES = 256 * 2**20                                           # largest set that is kept decoded in memory


class ImageSource:
    """N images of C channels; the subclasses define how an image is loaded.

    :ivar labels: int64 [N], or None.
    :ivar no_labels: the reason if `labels` is None; it names the first image without a class.
    :ivar class_names: names of the classes; empty if they are not known.
    :ivar labels_from: where the classes come from.
    :ivar note: how images with another number of channels are converted; empty if none are.
    :ivar holds_moments: whether the images are means and standard deviations of latents. Then C is twice the number of
        channels of a latent, and `latents` is their record.
    """

    holds_moments = False
    latents: LatentRecord | None = None

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
        """Whether its images are floats, which are given to the network unchanged, and not bytes."""
        return False

    @property
    def in_memory(self) -> bool:
        """Whether every image stays in memory once it has been read."""
        return self._keeps

    def take_labels(self, labels: Labels) -> None:
        """Set the classes of the images."""
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
        """Prepare the images of a batch; there is nothing to do, since every image can be read at any time."""

    def classes(self, indices: np.ndarray) -> np.ndarray:
        """The classes of these images, of a source that has `labels`: int64 [B]."""
        assert self.labels is not None, "whoever asks has checked it"
        return self.labels[indices]

    def _square(self, i: int) -> np.ndarray:
        size = self.image_size
        return centre_crop(self.load(i), size).reshape(size, size, self.channels)

    def __getstate__(self) -> dict[str, Any]:
        """The state without decoded images: another process decodes them itself."""
        return {**self.__dict__, "_cache": None, "_cached": np.zeros(len(self), bool)}


class EncodedSource(ImageSource):
    """Images in a folder or an archive, decoded on demand. Names are relative paths with slashes.

    If there are arrays (.npy) and no images, these are latents, see `cm.data.latents`.
    """

    def __init__(self, data_dir: str, image_size: int, found: Found, channels: int = 3):
        names, self.has_label_file = found
        if not names:
            raise UserError(f"no images in {data_dir}: looked at every depth for {' '.join(IMAGE_SUFFIXES)}")
        self.holds_moments = not names[0].lower().endswith(IMAGE_SUFFIXES)
        if channels not in MODES and not self.holds_moments:
            raise UserError(f"--channels {channels}: the image files of {data_dir} have 1 channel (grey) or 3; latents "
                            "of other channels are read from an npz with arr_0 [N,H,W,C], or from a zip or folder that "
                            "datasets/encode.py makes")
        super().__init__(data_dir, image_size, len(names), channels)
        if channels == 1 and not self.holds_moments:
            self.note = "read as grey: images in colour are converted to their luma"
        self._names = names
        if self.has_label_file:
            try:
                text = self.read(LABEL_FILE, label_budget(len(names)).bytes)
            except untrusted.DAMAGE as error:
                raise UserError(f"{data_dir}: {LABEL_FILE} cannot be read: {error}") from None
            self.take_labels(labels_of_json(text, names))
            self.latents = record_of_json(text, data_dir, len(names)) if self.holds_moments else None
        else:
            self.take_labels(labels_of_names(names))

    def label_by(self, rule: str) -> None:
        """Take the classes by another rule than "auto", see `labels_of_names`; a dataset.json wins over each."""
        if not self.has_label_file:
            self.take_labels(labels_of_names(self._names, rule))

    @property
    def holds_floats(self) -> bool:
        """Whether it holds latents."""
        return self.holds_moments

    def take_shape(self) -> None:
        """Take the size and the channels of latents, which are not cropped, from the first of them.

        :raises UserError: if it cannot be read.
        """
        height, width, self.channels = self.moments(0).shape
        if height != width:
            raise UserError(f"{self.data_dir} holds latents of {height}x{width}, and they must be square")
        self.image_size = height
        self.keep_decoded(CACHE_BYTES)
        self.note = f"mean and standard deviation of latents of {self.channels // 2} channels, drawn anew each time"

    def name(self, i: int) -> str:
        """The path of image i in the folder or archive."""
        return self._names[i]

    def load(self, i: int) -> Image.Image:
        """The complete image i in RGB or, with one channel, in grey (mode L).

        :raises UserError: if it cannot be read; the message names it.
        """
        if self.holds_moments:
            raise UserError(f"{self.data_dir} contains latents, which cannot be cropped: drop --random_crop")
        with self._naming(i):
            image = decode(self.encoded(i))
            return image.convert(MODES[1]) if self.channels == 1 else image

    def moments(self, i: int) -> np.ndarray:
        """Mean and standard deviation of latent i: float32 [H,W,2C].

        :raises UserError: if it cannot be read; the message names it.
        """
        with self._naming(i):
            return moments_of(self.encoded(i))

    def _square(self, i: int) -> np.ndarray:
        if not self.holds_moments:
            return super()._square(i)
        found, wanted = self.moments(i), (self.image_size, self.image_size, self.channels)
        if found.shape != wanted:
            raise UserError(f"{self.data_dir}: {self._names[i]} is {list(found.shape)} as [H,W,2C], and the others are "
                            f"{list(wanted)}: all latents of a data set must have the same shape")
        return found

    @contextmanager
    def _naming(self, i: int) -> Iterator[None]:
        """Where a failure to read becomes one whose message names image i."""
        try:
            yield
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
