"""The images of one side that a rank evaluates: from files, or as a model generates them.

Batches of files are cut before the ranks share them, so the network sees the same batches on any number of ranks.
Shapes: N images of the set, B of a batch, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cm.data.class_names import ClassNames
from evaluations.engine.image_files import Pictures, SizedImages
from evaluations.engine.readers import as_rgb
from evaluations.metrics.points import Ranks

Batches = Iterable[tuple[int, NDArray[np.uint8]]]           # index in the set of a batch's first image, [B,H,W,3]
FIRST = 2                                                   # images that an extractor is tried on


class Images(SizedImages, Protocol):
    """Images that a rank reads its share of."""

    def expected(self, batch_size: int, ranks: Ranks) -> int:
        """The largest number of images in this rank's share; 0 if it is not known."""
        ...

    def batches(self, batch_size: int, ranks: Ranks) -> Iterator[tuple[int, NDArray[np.uint8], int]]:
        """This rank's batches: the place of the first image in the set, [B,H,W,3], and the number of images that all
        ranks together have shown since the last.

        :raises UserError: if an image cannot be read.
        """
        ...


class FileImages:
    """Images of a folder, zip or npz, all or a choice of them.

    :param indices: ascending; None for all.
    """

    def __init__(self, pictures: Pictures, indices: NDArray[np.int64] | None = None):
        self.pictures, self.path = pictures, pictures.path
        self.indices = np.arange(len(pictures)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def first_images(self) -> NDArray[np.uint8]:
        """The first images, to try an extractor on: [FIRST,H,W,3] or fewer."""
        return next(iter(self.pictures.take([self.indices[:FIRST]])))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pictures.size

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class labels [N], or None."""
        labels = self.pictures.labels
        return None if labels is None else labels[self.indices]

    @property
    def class_names(self) -> ClassNames:
        """The names of the classes of all images; none where they are not known."""
        return self.pictures.class_names

    def name(self, i: int) -> str:
        """The name of image i of the choice in messages."""
        return self.pictures.name(int(self.indices[i]))

    def expected(self, batch_size: int, ranks: Ranks) -> int:
        """The number of images in this rank's share."""
        return sum(map(len, self._groups(batch_size)[ranks.rank :: ranks.count]))

    def batches(self, batch_size: int, ranks: Ranks) -> Iterator[tuple[int, NDArray[np.uint8], int]]:
        """The batches in turn: the first for rank 0, the second for rank 1, ..."""
        groups = self._groups(batch_size)
        numbers = range(ranks.rank, len(groups), ranks.count)
        for number, images in zip(numbers, self.pictures.take([groups[number] for number in numbers])):
            first = number - ranks.rank
            yield number * batch_size, images, sum(map(len, groups[first : first + ranks.count]))

    def _groups(self, batch_size: int) -> list[NDArray[np.int64]]:
        return np.split(self.indices, range(batch_size, len(self.indices), batch_size))


class GivenImages:
    """Images that are made as they are asked for, uint8 as they would be saved; grey ones are repeated.

    :param batches: this rank's share.
    :param size: (H, W).
    """

    path, labels, class_names = "the images", None, ()

    def __init__(self, batches: Batches, size: tuple[int, int], expected: int = 0):
        self._batches, self.size, self._expected = batches, size, expected

    def __len__(self) -> int:
        return 0                                            # not known before the last has come

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return f"image {i}"

    def expected(self, batch_size: int, ranks: Ranks) -> int:
        """The number of images that the caller expects."""
        return self._expected

    def batches(self, batch_size: int, ranks: Ranks) -> Iterator[tuple[int, NDArray[np.uint8], int]]:
        """The batches in the order in which they arrive."""
        return ((start, as_rgb(images), len(images)) for start, images in self._batches)
