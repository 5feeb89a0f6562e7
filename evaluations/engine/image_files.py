"""The images of a folder, a zip or an npz at their own size, read in any sorted choice.

Shapes: N images, B of a group, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cm.data.sources import ImageSource, open_source
from cm.errors import UserError
from evaluations.engine.readers import BatchFile

CHUNK = 64                                                  # images read at once from an npz


class Pictures(Protocol):
    """N images of one size."""

    path: str
    labels: NDArray[np.int64] | None                        # [N]

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What messages call image i."""

    def take(self, groups: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        """The images [B,H,W,3] of each group of indices [B], which ascend within and over the groups.

        :raises UserError: if one cannot be read, or is of another size than the first that was read.
        """


class EncodedPictures:
    """The images of a folder or a zip."""

    def __init__(self, source: ImageSource):
        self.source, self.path, self.labels = source, source.data_dir, source.labels
        self._first: tuple[int, tuple[int, ...]] | None = None          # index and shape of the first that was read

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def take(self, groups: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        for group in groups:
            yield np.stack([self._pixels(i) for i in group.tolist()])

    def _pixels(self, i: int) -> NDArray[np.uint8]:
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

    :raises UserError: if it holds only statistics.
    """

    def __init__(self, file: BatchFile):
        if not file.has_images:
            raise UserError(f"{file.path} holds only statistics, no images (arr_0)")
        self.file, self.path, self.labels = file, file.path, file.labels()

    def __len__(self) -> int:
        return len(self.file)

    def name(self, i: int) -> str:
        return f"image {i}"

    def take(self, groups: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        chunks, start = self.file.batches(CHUNK), 0
        chunk = next(chunks)
        for group in groups:
            found = [chunk[group[(group >= start) & (group < start + len(chunk))] - start]]
            while group[-1] >= start + len(chunk):
                start, chunk = start + len(chunk), next(chunks)
                found.append(chunk[group[(group >= start) & (group < start + len(chunk))] - start])
            yield np.concatenate(found)


def open_pictures(path: str, flag: str) -> Pictures:
    """The images at a path: an npz if its name ends so, else what `cm.data.sources.open_source` makes of it.

    :param flag: what messages call the path.
    :raises UserError: if there is nothing of that name, or it holds no images.
    """
    if path.lower().endswith(".npz"):
        return NpzPictures(BatchFile(path))
    return EncodedPictures(open_source(path, image_size=1, flag=flag))  # that size is for crops, which nobody takes


def width_by_height(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
