"""Images of published formats that several processes can read, and those of them that are arrays in memory.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cm.data.class_names import ClassNames
from cm.errors import UserError


class RawImages(Protocol):
    """N images that several processes can read: each process opens the files for itself."""

    @property
    def labels(self) -> list[Any] | None:
        """N classes or vectors, or None."""
        ...

    @property
    def class_names(self) -> ClassNames:
        """The names of the classes, where these are numbers and the names are known."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        ...

    def image(self, i: int) -> Image.Image:
        """Image i in RGB or grey (mode L). The errors of its decoder are passed on."""
        ...


class Arrays:
    """Images in memory: uint8 [N,H,W] or [N,H,W,3]."""

    class_names: ClassNames = ()

    def __init__(self, title: str, images: np.ndarray, labels: list[int]):
        self.title, self.images, self.labels = title, images, labels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """The file and the number of the image."""
        return f"{self.title} image {i}"

    def image(self, i: int) -> Image.Image:
        """Image i in RGB or grey (mode L)."""
        return Image.fromarray(self.images[i])


def existing(path: Path) -> Path:
    """The path.

    :raises UserError: if there is no file.
    """
    if not path.is_file():
        raise UserError(f"--source {path}: no such file")
    return path
