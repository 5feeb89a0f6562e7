"""The images of a folder, a zip or an npz, at their own size or cropped as for training, read in any sorted choice.

Shapes: N images, B of a group, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cm.data.class_names import ClassNames
from cm.data.decode import centre_crop
from cm.data.image_source import ImageSource
from cm.data.sources import open_source
from cm.errors import UserError
from evaluations.engine.readers import BatchFile

CHUNK = 64                                                  # images read at once from an npz


class SizedImages(Protocol):
    """N images of one size."""

    path: str                                               # name of the set in messages

    def __len__(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class labels [N], or None."""
        ...

    @property
    def class_names(self) -> ClassNames:
        """The names of the classes; none where they are not known."""
        ...

    def name(self, i: int) -> str:
        """The name of image i of the set in messages."""
        ...


class Pictures(SizedImages, Protocol):
    """Images that can be read in any sorted choice."""

    def take(self, groups: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        """The images [B,H,W,3] of each group of indices [B], which ascend within and over the groups.

        :raises UserError: if one cannot be read, or is of another size than the first that was read.
        """
        ...


class EncodedPictures:
    """The images of a folder or a zip.

    :param image_size: side to crop and resize to, as training does; None for the images' own size.
    """

    def __init__(self, source: ImageSource, image_size: int | None = None):
        self.source, self.path, self.image_size = source, source.data_dir, image_size
        self._first: tuple[int, tuple[int, ...]] | None = None          # index and shape of the first that was read

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class labels [N], or None."""
        return self.source.labels

    @property
    def class_names(self) -> ClassNames:
        """The names of the classes; none where they are not known."""
        return self.source.class_names

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), of the first image unless all are resized."""
        return (self.image_size, self.image_size) if self.image_size else self._first_size

    @cached_property
    def _first_size(self) -> tuple[int, int]:
        height, width = self._pixels(0).shape[:2]
        return height, width

    def name(self, i: int) -> str:
        """The file's name in the folder or zip."""
        return self.source.name(i)

    def take(self, groups: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        """The images of each group of indices."""
        for group in groups:
            yield np.stack([self._pixels(i) for i in group.tolist()])

    def _pixels(self, i: int) -> NDArray[np.uint8]:
        if self.image_size:
            return centre_crop(self.source.load(i), self.image_size)
        pixels = np.asarray(self.source.load(i))            # [H,W,3]
        first, shape = self._first = self._first or (i, pixels.shape)
        if pixels.shape != shape:
            raise UserError(
                f"{self.path}: all images must have one size, but {self.name(first)} is {width_by_height(shape)} and "
                f"{self.name(i)} is {width_by_height(pixels.shape)}; resize them all in the same way first"
            )
        return pixels


class NpzPictures:
    """The images (arr_0) of an npz, streamed in file order.

    :param image_size: side to crop and resize to, as training does; None for the images' own size.
    :raises UserError: if it holds only statistics.
    """

    def __init__(self, file: BatchFile, image_size: int | None = None):
        file.check_has_images()
        assert file.image_shape is not None
        self.file, self.path, self.image_size = file, file.path, image_size
        height, width = file.image_shape[1:3]
        self.size = (image_size, image_size) if image_size else (height, width)

    def __len__(self) -> int:
        return len(self.file)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class labels (arr_1), or None."""
        return self._labels

    @property
    def class_names(self) -> ClassNames:
        """The names of the classes; none where they are not known."""
        return self._class_names

    @cached_property
    def _class_names(self) -> ClassNames:
        return self.file.class_names()

    @cached_property
    def _labels(self) -> NDArray[np.int64] | None:
        return self.file.labels()

    def name(self, i: int) -> str:
        """Its place in the file."""
        return f"image {i}"

    def take(self, groups: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        """The images of each group of indices."""
        chunks, start = self.file.batches(CHUNK), 0
        chunk = next(chunks)
        for group in groups:
            found = [chunk[group[(group >= start) & (group < start + len(chunk))] - start]]
            while group[-1] >= start + len(chunk):
                start, chunk = start + len(chunk), next(chunks)
                found.append(chunk[group[(group >= start) & (group < start + len(chunk))] - start])
            images = np.concatenate(found)
            if self.image_size:
                images = np.stack([centre_crop(Image.fromarray(image), self.image_size) for image in images])
            yield images


def open_pictures(path: str, flag: str, image_size: int | None = None) -> Pictures:
    """The images at a path: an npz if its name ends so, else what `cm.data.sources.open_source` makes of it.

    :param flag: name of the path in messages.
    :param image_size: side to crop and resize to, as training does; None for the images' own size.
    :raises UserError: if there is nothing of that name, or it holds no images.
    """
    if path.lower().endswith(".npz"):
        return NpzPictures(BatchFile(path), image_size)
    # The source's own crops, for which it is given a size, are not asked for.
    return EncodedPictures(open_source(path, image_size=1, flag=flag), image_size)


def width_by_height(shape: tuple[int, ...]) -> str:
    """The size of an image [H,W,3] in messages."""
    return f"{shape[1]}x{shape[0]}"
