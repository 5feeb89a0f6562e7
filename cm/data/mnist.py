"""MNIST in its published form: compressed idx files of images and labels."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from cm.data.raw_images import Arrays, existing
from cm.errors import UserError
from cm.io.budget import INFLATED, open_regular
from cm.io.untrusted import BOMB_RATIO

MNIST_SUFFIX = "-images-idx3-ubyte.gz"
IDX_UINT8 = 0x08                                                    # type byte of an idx file
MNIST_PADDING = 2                                                   # pixels on each side: 28 becomes 32


def open_mnist(path: Path) -> Arrays:
    """The digits as grey images [N,32,32], padded with black, and their classes from the file of labels next to them.

    :raises UserError: if a file is missing or damaged.
    """
    labels_path = path.with_name(path.name.removesuffix(MNIST_SUFFIX) + "-labels-idx1-ubyte.gz")
    images, labels = _read_idx(path, 3), _read_idx(existing(labels_path), 1)
    if len(images) != len(labels):
        raise UserError(f"{path} has {len(images)} images, and {labels_path} {len(labels)} labels")
    padding = [(0, 0), (MNIST_PADDING, MNIST_PADDING), (MNIST_PADDING, MNIST_PADDING)]
    return Arrays(path.name, np.pad(images, padding), labels.tolist())


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """A compressed idx file of bytes: two zeros, type, number of axes, lengths as big-endian int32, values.

    :raises UserError: if it is anything else, or damaged.
    """
    try:
        with open_regular(path) as packed, gzip.open(packed) as file:
            limit = max(INFLATED.bytes, BOMB_RATIO * path.stat().st_size)
            header = file.read(4 + 4 * axes)
            is_idx = header[:4] == bytes([0, 0, IDX_UINT8, axes]) and len(header) == 4 + 4 * axes
            shape = np.frombuffer(header[4:], ">u4").tolist() if is_idx else []
            size = math.prod(shape)
            if size > limit:
                raise UserError(f"{path} would expand to {size:,} bytes, too many for a file of this size")
            data = file.read(size + 1) if is_idx else b""
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a gzip file, or the download is not complete: {error}") from None
    if not is_idx or len(data) != size:
        raise UserError(f"{path} is not an idx file of bytes with {axes} axes, or it is cut short")
    return np.frombuffer(data, np.uint8).reshape(shape)
