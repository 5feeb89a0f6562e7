"""Conversion of images from and to the formats of callers: PIL images, uint8 arrays or float tensors.

Shapes: N images, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from PIL import Image
from torch import Tensor

from cm.errors import UserError
from cm.generate.npz import to_array

Pictures = Any
"""PIL images (one or a list), uint8 [N,H,W,C] or [H,W,C], or float tensors [N,C,H,W] in [-1, 1]."""

OUTPUTS = ("pil", "array", "tensor")
MODES = {1: "L", 3: "RGB"}
LARGEST = 1.5                                               # largest value of images in [-1, 1] that were not clamped


def from_tensor(images: Tensor, output: str) -> Any:
    """Convert images [N,C,H,W] in [-1, 1] to an output format.

    :param output: "pil" for a list of PIL images, "array" for uint8 [N,H,W,C] (latents: float32), "tensor"
        for the float32 tensor itself.
    :raises UserError: for PIL images of other than 1 or 3 channels.
    """
    if output == "tensor":
        return images.float()
    pixels = to_array(images, nearest=True)
    if output == "array":
        return pixels
    channels = pixels.shape[-1]
    if channels not in MODES:
        raise UserError(f"images of {channels} channels cannot be PIL images: choose output='array' or 'tensor'")
    flat = pixels[..., 0] if channels == 1 else pixels
    return [Image.fromarray(each, MODES[channels]) for each in flat]


def to_tensor(images: Pictures, size: int, channels: int) -> Tensor:
    """Convert images of a caller to a float tensor [N,C,H,W] in [-1, 1].

    :raises UserError: for images of another size, number of channels or type.
    """
    if isinstance(images, Tensor):
        found = images.float()
        found = found[None] if found.ndim == 3 else found
    else:
        found = _from_pixels(_as_array(images, channels))
    if found.ndim != 4 or tuple(found.shape[1:]) != (channels, size, size):
        raise UserError(f"images of shape {tuple(found.shape)}: this model takes [N,{channels},{size},{size}] tensors "
                        f"in [-1, 1], uint8 arrays [N,{size},{size},{channels}], or PIL images of {size}x{size}")
    return found


def _as_array(images: Pictures, channels: int) -> np.ndarray:
    """uint8 [N,H,W,C]."""
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Sequence) and images and all(isinstance(each, Image.Image) for each in images):
        mode = MODES.get(channels)
        if mode is None:
            raise UserError(f"this model takes {channels} channels, which PIL images do not have: give an array")
        sizes = {each.size for each in images}
        if len(sizes) > 1:
            raise UserError(f"the images have different sizes: {', '.join(f'{w}x{h}' for w, h in sorted(sizes))}")
        stack = np.stack([np.asarray(each.convert(mode)) for each in images])
        return stack if stack.ndim == 4 else stack[..., None]
    array = np.asarray(images)
    if array.dtype != np.uint8:
        raise UserError(f"images of type {array.dtype}: give uint8 arrays [N,H,W,C], PIL images, or a float tensor in "
                        "[-1, 1]")
    return array[None] if array.ndim == 3 else array


def _from_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 [N,H,W,C] as float [N,C,H,W] in [-1, 1]; any other shape is left to the caller, which refuses it."""
    images = th.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1
    return images.movedim(-1, 1) if images.ndim == 4 else images


def check_range(images: Tensor, noisy: bool) -> None:
    """Refuse float images [N,C,H,W] that are not in [-1, 1].

    :param noisy: noisy images may have any range, and so may latents.
    :raises UserError: with the range of the images.
    """
    lowest, highest = images.aminmax()
    if not (lowest.isfinite() and highest.isfinite()):
        raise UserError("the images have NaN or infinite pixels")
    if not noisy and images.shape[1] in MODES and max(-lowest, highest) > LARGEST:
        raise UserError(f"images with values from {lowest:g} to {highest:g}: give a float tensor in [-1, 1] (from "
                        "[0, 255]: x / 127.5 - 1), uint8 arrays [N,H,W,C] or PIL images")


def known_pixels(mask: Any) -> np.ndarray:
    """Convert a mask [H,W] of a caller to booleans: True for known pixels, which are 1, 255 or light.

    :raises UserError: if an array holds anything but 0 and 1, or 0 and 255.
    """
    if isinstance(mask, Image.Image):
        return np.asarray(mask.convert("L")) >= 128         # as image_edit.py reads it
    array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.dtype.kind not in "biuf" or not any(np.isin(array, (0, known)).all() for known in (1, 255)):
        raise UserError("mask must hold 1 where a pixel is known and 0 where it is not, nothing else (or 255 and 0)")
    return array > 0
