"""Streams of images: parts that are read from front to back, in an exact order that is kept by counting.

A stream has no random access, so its order is made of two shuffles. Each epoch has its own order of the parts, which
depends on (seed, epoch). The images that follow, over parts and epochs, are cut into windows, and each window is
shuffled in memory, by (seed, number of the window). So position p of a run shows one certain image, whatever was read
before: all ranks see the same order, and a run resumes at any position, by counting the images before its window.

Shapes: B images of a batch, S image_size, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from cm.data.decode import MODES, centre_crop, decode, why_unreadable
from cm.data.latents import LatentRecord
from cm.errors import UserError

WINDOW = 1000                                                       # images that are shuffled among each other


class Item(NamedTuple):
    """One image of a stream, as it is stored."""

    name: str                                                       # of the part and of the image in it, for messages
    data: bytes                                                     # an image file
    label: int | None                                               # its class


class ImageStream(Protocol):
    """A set of images in parts, such as the shards of a WebDataset, each of which is read from front to back."""

    data_dir: str

    @property
    def num_parts(self) -> int:
        """The number of parts."""
        ...

    def count(self, part: int) -> int:
        """How many images a part has; it may take reading it once.

        :raises UserError: if the part is damaged.
        """
        ...

    def items(self, part: int) -> Iterator[Item]:
        """The images of a part, always in the same order.

        :raises UserError: if the part is damaged; the message names it and the place.
        """
        ...


def _permutation(seed: int, stream: str, number: int, length: int) -> np.ndarray:
    from cm.random_util import stream_seed  # imports torch, which a command's --help does without

    return np.random.Generator(np.random.Philox(key=stream_seed(seed, stream, number))).permutation(length)


class WindowOrder:
    """The image of each position of a run, as its place in the endless sequence of a stream."""

    def __init__(self, seed: int, window: int, shuffle: bool = True):
        self._seed, self._window, self._shuffle = seed, window, shuffle

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [B] -> places in the sequence, int64 [B]."""
        if not self._shuffle:
            return positions
        windows, places = np.divmod(positions, self._window)
        found = np.empty_like(places)
        for window in np.unique(windows):
            here = windows == window
            shuffled = _permutation(self._seed, "window", int(window), self._window)
            found[here] = window * self._window + shuffled[places[here]]
        return found


class Sequence:
    """The images of a stream, epoch after epoch without end, from any place on.

    A place is found by counting: parts that lie before it are counted once and then passed over, whole epochs as soon
    as each part was counted.
    """

    def __init__(self, stream: ImageStream, seed: int, shuffle: bool):
        self._stream, self._seed, self._shuffle = stream, seed, shuffle
        self._counts: dict[int, int] = {}
        self._iterator: Iterator[Item] | None = None
        self._next, self._process = 0, os.getpid()

    def take(self, start: int, count: int) -> list[Item]:
        """The images at the places start .. start + count - 1. Going forward continues reading."""
        if self._process != os.getpid():                            # files of another process share their position
            self._iterator, self._process = None, os.getpid()
        if self._iterator is None or start < self._next:
            self._iterator, self._next = self._from(start), start
        items = list(islice(self._iterator, start - self._next, start - self._next + count))
        self._next = start + count
        return items

    def _from(self, start: int) -> Iterator[Item]:
        epoch, before = 0, start
        while True:
            if len(self._counts) == self._stream.num_parts:
                total = sum(self._counts.values())
                if not total:
                    raise UserError(f"{self._stream.data_dir} has no images in its {self._stream.num_parts} part(s)")
                epoch, before = epoch + before // total, before % total
            for part in self._parts(epoch):
                count = self._count(part)
                if before < count:
                    yield from islice(self._stream.items(part), before, None)
                before = max(0, before - count)
            epoch += 1

    def _parts(self, epoch: int) -> list[int]:
        parts = self._stream.num_parts
        return _permutation(self._seed, "parts", epoch, parts).tolist() if self._shuffle else list(range(parts))

    def _count(self, part: int) -> int:
        if part not in self._counts:
            self._counts[part] = self._stream.count(part)
        return self._counts[part]


class StreamedSource:
    """What the loader asks of a set of images, answered by a stream. Indices are places in its endless sequence.

    :param window: how many images are held at once, as they are stored, to be shuffled.
    :raises UserError: for channels other than 1 and 3.
    """

    in_memory = holds_floats = False
    latents: LatentRecord | None = None

    def __init__(
        self, stream: ImageStream, image_size: int, channels: int = 3, *, seed: int = 0, shuffle: bool = True,
        window: int = WINDOW, num_classes: int | None = None,
    ):
        if channels not in MODES:
            raise UserError(f"--channels {channels}: the image files of {stream.data_dir} have 1 channel (grey) or 3; "
                            "latents of other channels are read from an npz with arr_0 [N,H,W,C]")
        self.stream, self.data_dir = stream, stream.data_dir
        self.image_size, self.channels = image_size, channels
        self.window, self.num_classes = window, num_classes
        self.order = WindowOrder(seed, window, shuffle)
        self._sequence = Sequence(stream, seed, shuffle)
        self._held: dict[int, list[Item]] = {}

    def gather(self, indices: np.ndarray) -> None:
        """Hold the windows that these images are in, int64 [B], and no others.

        Windows before the first, which only reference images of a run's start are in, are those of later places.

        :raises UserError: if a part is damaged, or there are no images.
        """
        windows = np.unique(indices // self.window).tolist()
        self._held = {number: held for number, held in self._held.items() if number in windows}
        for number in windows:
            if number not in self._held:
                self._held[number] = self._sequence.take(abs(number) * self.window, self.window)

    def _item(self, i: int) -> Item:
        number, place = divmod(i, self.window)
        return self._held[number][place]

    def load(self, i: int) -> Image.Image:
        """The complete image i, which was gathered, in RGB or grey.

        :raises UserError: if it cannot be read; the message names it.
        """
        item = self._item(i)
        try:
            image = decode(item.data)
        except MemoryError:
            raise
        except Exception as error:                                  # decoders raise many kinds
            raise UserError(f"{item.name} cannot be read: {why_unreadable(error)}. Replace or remove it.") from error
        return image.convert(MODES[1]) if self.channels == 1 else image

    def images(self, indices: np.ndarray) -> np.ndarray:
        """The largest central squares of images that were gathered: int64 [B] -> uint8 [B,S,S,C]."""
        size = self.image_size
        squares = [centre_crop(self.load(i), size).reshape(size, size, self.channels) for i in indices.tolist()]
        return np.stack(squares)

    def classes(self, indices: np.ndarray) -> np.ndarray:
        """The classes of images that were gathered: int64 [B].

        :raises UserError: if one has none, or one that is not less than `num_classes`.
        """
        items = [self._item(i) for i in indices.tolist()]
        for item in items:
            if item.label is None:
                raise UserError(f"--class_cond needs a class for every image, but {item.name} has none (.cls or .json)")
            if self.num_classes is not None and item.label >= self.num_classes:
                raise UserError(f"{item.name} is of class {item.label}, but the network has {self.num_classes} "
                                "classes, counted from 0")
        return np.array([item.label for item in items], np.int64)
