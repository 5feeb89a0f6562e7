"""The npz that sampling writes: images in uint8, or latents in float32, in constant memory."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zipfile

import numpy as np
import torch as th
from torch import Tensor

from cm.data.decode import MODES
from cm.io import atomic

COPIED_AT_ONCE = 2**22                                      # bytes


def to_uint8(images: Tensor, nearest: bool = False) -> np.ndarray:
    """[N,C,H,W] in [-1, 1] -> [N,H,W,C] uint8, truncating as guided-diffusion does.

    :param nearest: round to the nearest level instead. Pixels that came from uint8 then stay what they were, where
        truncation lowers some by one level.
    """
    pixels = ((images + 1) * 127.5).clamp(0, 255)
    pixels = (pixels.round() if nearest else pixels).to(th.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def type_of(channels: int) -> np.dtype:
    """The dtype in which samples are written: uint8 for pictures (1 or 3 channels), float32 for latents."""
    return np.dtype(np.uint8 if channels in MODES else np.float32)


def to_array(images: Tensor, nearest: bool = False) -> np.ndarray:
    """[N,C,H,W] -> [N,H,W,C] in `type_of(C)`: pictures as `to_uint8` makes them, latents as they are."""
    if images.shape[1] in MODES:
        return to_uint8(images, nearest)
    return images.float().permute(0, 2, 3, 1).contiguous().cpu().numpy()


class NpzWriter:
    """Writes {kind}_NxHxWxC.npz (arr_0 images, arr_1 labels) row by row, in memory that does not grow with N.

    Rows may arrive in any order. Until `close`, they are in an unnamed file in the same folder. It takes the disk space
    of all images from the start, and disappears with the process. The npz appears at the end of `close`.

    :raises UserError: from every method but `put`, if the disk is full or the folder cannot be written.
    """

    def __init__(
        self, directory: str, count: int, height: int, width: int, with_labels: bool, kind: str = "samples",
        channels: int = 3,
    ):
        shape, dtype = (count, height, width, channels), type_of(channels)
        self.path = os.path.join(directory, f"{kind}_{'x'.join(map(str, shape))}.npz")
        atomic.remove_temporaries(self.path)
        try:
            self._rows = tempfile.TemporaryFile(dir=directory or ".")  # noqa: SIM115 (open until `close`)
            np.lib.format.write_array_header_1_0(
                self._rows, {"descr": dtype.str, "fortran_order": False, "shape": shape}
            )
            start = self._rows.tell()
            # A page of a file that has no room on the disk would end the process by a signal when it is filled.
            os.posix_fallocate(self._rows.fileno(), 0, start + math.prod(shape) * dtype.itemsize)
        except OSError as error:
            raise atomic.write_failure(self.path, error) from error
        self.images = np.memmap(self._rows, dtype, "r+", start, shape)
        self.labels = np.zeros(count, np.int64) if with_labels else None

    def put(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray | None) -> None:
        """Rows `indices` [n] of the result: images [n,H,W,C], labels [n]."""
        self.images[indices] = images
        if self.labels is not None and labels is not None:
            self.labels[indices] = labels

    def close(self, **extra: np.ndarray) -> str:
        """Pack the rows, and other arrays by their names; returns the path of the npz."""
        labels = {} if self.labels is None else {"arr_1": self.labels}
        with atomic.AtomicFile(self.path) as file:
            self.images.flush()
            self._rows.seek(0)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    shutil.copyfileobj(self._rows, member, COPIED_AT_ONCE)
                for name, array in {**labels, **extra}.items():
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, array)
        self._rows.close()
        return self.path
