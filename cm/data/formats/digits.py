"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from cm.data.formats.npz import ArraySource, with_channels
from cm.data.image_source import Format
from cm.data.labels import Labels
from cm.errors import UserError


def digits_source(data_dir: str, image_size: int, channels: int = 3) -> ArraySource:
    """1797 handwritten digits of 8x8 pixels in 10 classes, from scikit-learn's own files.

    :raises UserError: if scikit-learn is not installed, or for channels other than 1 and 3.
    """
    rows = np.loadtxt(digits_file(), delimiter=",", dtype=np.uint8)     # [1797,65]: 64 pixels in 0..16, the class
    labels = rows[:, 64]
    grey = np.round(rows[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images, _ = with_channels(grey, channels, data_dir)
    classes = Labels(labels.astype(np.int64), "", tuple(map(str, range(10))), "scikit-learn")
    return ArraySource(data_dir, image_size, images, classes)


def digits_file() -> Path:
    """The file in scikit-learn's folder; importing scikit-learn would take longer than the first step of a training.

    :raises UserError: if there is none.
    """
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return path
    raise UserError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")


FORMAT = Format(lambda data_dir: data_dir == "digits", digits_source, "the word digits", on_disk="no", is_sent=True)
