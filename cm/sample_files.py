"""What sampling leaves on disk: an npz of uint8 images in constant memory, and a PNG grid to look at."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence

import numpy as np
import torch as th
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_uint8(images: Tensor, nearest: bool = False) -> np.ndarray:
    """[N,C,H,W] in [-1, 1] -> [N,H,W,C] uint8, truncating as guided-diffusion does.

    :param nearest: round instead: pixels that came from uint8 are found again, where truncation loses a level of some.
    """
    pixels = ((images + 1) * 127.5).clamp(0, 255)
    pixels = (pixels.round() if nearest else pixels).to(th.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class NpzWriter:
    """Writes {kind}_NxHxWx3.npz (arr_0 images, arr_1 labels) row by row, in memory that does not grow with N.

    Rows may arrive in any order. The file appears under its name only when `close` has written it whole.
    """

    def __init__(self, directory: str, count: int, height: int, width: int, with_labels: bool, kind: str = "samples"):
        self.path = os.path.join(directory, f"{kind}_{count}x{height}x{width}x3.npz")
        self.raw_path = f"{self.path}.arr_0.partial"
        self.images = np.lib.format.open_memmap(self.raw_path, "w+", np.uint8, (count, height, width, 3))
        self.labels = np.zeros(count, np.int64) if with_labels else None

    def put(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray | None) -> None:
        """Rows `indices` [n] of the result: images [n,H,W,3] uint8, labels [n]."""
        self.images[indices] = images
        if self.labels is not None:
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


def image_grid(images: np.ndarray, columns: int, scale: int = 1, gap: int = 1) -> Image.Image:
    """[N,H,W,3] uint8 -> one picture, row by row, each pixel `scale` wide."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_h - gap, columns * cell_w - gap, 3), 255, np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * cell_h, place % columns * cell_w
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet)


def labelled_rows(rows: Sequence[tuple[str, np.ndarray]], scale: int, text_size: int = 16) -> Image.Image:
    """Pictures one above the other, each row of images [n,H,W,3] with its name on the left."""
    font = ImageFont.load_default(text_size)
    strips = [(name, image_grid(images, len(images), scale)) for name, images in rows]
    margin = max(int(font.getlength(line)) for name, _ in strips for line in name.split("\n")) + 2 * text_size
    height = sum(strip.height + text_size // 2 for _, strip in strips) + text_size // 2
    sheet = Image.new("RGB", (margin + max(strip.width for _, strip in strips) + text_size // 2, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = text_size // 2
    for name, strip in strips:
        draw.text((text_size, top + strip.height / 2), name, fill="black", font=font, anchor="lm")
        sheet.paste(strip, (margin, top))
        top += strip.height + text_size // 2
    return sheet


def grid_scale(image_size: int) -> int:
    """How much to enlarge small images so that a person can see them."""
    return max(1, 64 // image_size)
