"""What sampling writes to disk: an npz of uint8 images, in constant memory."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import torch as th
from torch import Tensor


def to_uint8(images: Tensor, nearest: bool = False) -> np.ndarray:
    """[N,C,H,W] in [-1, 1] -> [N,H,W,C] uint8, truncating as guided-diffusion does.

    :param nearest: round to the nearest level instead. Pixels that came from uint8 then stay what they were, where
        truncation lowers some by one level.
    """
    pixels = ((images + 1) * 127.5).clamp(0, 255)
    pixels = (pixels.round() if nearest else pixels).to(th.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class NpzWriter:
    """Writes {kind}_NxHxWx3.npz (arr_0 images, arr_1 labels) row by row, in memory that does not grow with N.

    Rows may arrive in any order. The file appears under its name only when `close` has written it completely.
    """

    def __init__(self, directory: str, count: int, height: int, width: int, with_labels: bool, kind: str = "samples"):
        self.path = os.path.join(directory, f"{kind}_{count}x{height}x{width}x3.npz")
        self.raw_path = f"{self.path}.arr_0.partial"
        self.images = np.lib.format.open_memmap(self.raw_path, "w+", np.uint8, (count, height, width, 3))
        self.labels = np.zeros(count, np.int64) if with_labels else None

    def put(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray | None) -> None:
        """Rows `indices` [n] of the result: images [n,H,W,3] uint8, labels [n]."""
        self.images[indices] = images
        if self.labels is not None and labels is not None:
            self.labels[indices] = labels

    def close(self, **extra: np.ndarray) -> str:
        """Pack the rows, and other arrays by their names; returns the path of the npz."""
        self.images.flush()
        partial = f"{self.path}.partial"
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.write(self.raw_path, "arr_0.npy")
            labels = {} if self.labels is None else {"arr_1": self.labels}
            for name, array in {**labels, **extra}.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array)
        os.replace(partial, self.path)
        os.remove(self.raw_path)
        return self.path
