"""Masks, boxes and pairs of samples that the flags of image_edit.py name, read and checked.

Shapes: S image_size, R results, P pairs.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from cm.config.sampling_schema import EditConfig
from cm.data.decode import IMAGE_BYTES, decode, why_unreadable
from cm.errors import UserError
from cm.io import budget, untrusted
from cm.io.storage import open_file


@dataclass(frozen=True)
class Arcs:
    """The pair of samples between which each result lies; one row per result."""

    ends: np.ndarray                                        # [R,2], sample indices
    weights: np.ndarray                                     # [R], 0 for the first of the two
    per_pair: int                                           # how many results a pair has


def read_mask(path: str, size: int) -> np.ndarray:
    """The mask of --mask, [S,S] boolean, True where known.

    :raises UserError: if it cannot be read, has another size, or holds other values than 0 and 1.
    """
    try:
        with open_file(path) as file:
            data = budget.read_file(file, IMAGE_BYTES)
        if path.lower().endswith(".npy"):
            mask = untrusted.read_array(io.BytesIO(data), len(data))
        else:
            mask = np.asarray(decode(data).convert("L")) >= 128
    except MemoryError:
        raise
    except Exception as error:                              # decoders raise many kinds
        raise UserError(f"--mask {path} cannot be read as a picture or npy: {why_unreadable(error)}") from None
    if mask.shape != (size, size):
        raise UserError(f"--mask {path} is {list(mask.shape)}; the network's images need a mask of [{size}, {size}]")
    if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise UserError(f"--mask {path} must hold 1 where a pixel is known and 0 where it is not, nothing else")
    return mask.astype(bool)


def box_mask(box: str, size: int) -> np.ndarray:
    """The mask of --mask_box, [S,S] boolean, False inside top,left,height,width.

    :raises UserError: if it is no box, or reaches outside.
    """
    numbers = _parse_numbers("mask_box", box, int, "8,8,16,16 for top,left,height,width")
    if len(numbers) != 4 or min(numbers) < 0 or min(numbers[2:]) == 0:
        raise UserError(f"--mask_box {box} is not top,left,height,width in pixels, such as 8,8,16,16")
    top, left, height, width = numbers
    if top + height > size or left + width > size:
        raise UserError(f"--mask_box {box} reaches outside of images of {size}x{size} pixels")
    mask = np.ones((size, size), bool)
    mask[top : top + height, left : left + width] = False
    return mask


def find_arcs(config: EditConfig) -> Arcs:
    """The results between samples that the flags of interpolation ask for.

    :raises UserError: for malformed weights or pairs.
    """
    weights = _parse_numbers("interpolate_weights", config.interpolate_weights, float, "0,0.5,1")
    if not weights or not all(0 <= weight <= 1 for weight in weights):
        raise UserError(f"--interpolate_weights {config.interpolate_weights!r} must lie between 0 and 1")
    pairs = np.array(_find_pairs(config), np.int64)          # [P,2]
    return Arcs(pairs.repeat(len(weights), axis=0), np.tile(np.array(weights), len(pairs)), len(weights))


def _find_pairs(config: EditConfig) -> list[tuple[int, int]]:
    if not config.interpolate_pairs:
        count = config.num_samples or 2
        if count < 2:
            raise UserError(f"--num_samples {count}: interpolation needs at least two")
        return [(i, i + 1) for i in range(count - 1)]
    if config.num_samples:
        raise UserError("--num_samples and --interpolate_pairs both say what to interpolate; drop one of them")
    pairs = []
    for pair in config.interpolate_pairs.split(","):
        ends = _parse_numbers("interpolate_pairs", pair, int, "0:1,4:7", separator=":")
        if len(ends) != 2 or min(ends) < 0 or ends[0] == ends[1]:
            raise UserError(f"--interpolate_pairs: {pair!r} is not a pair of two sample indices such as 0:1")
        pairs.append((ends[0], ends[1]))
    return pairs


def _parse_numbers(flag: str, text: str, kind: type, example: str, separator: str = ",") -> list[Any]:
    try:
        return [kind(part) for part in text.split(separator)]
    except ValueError:
        raise UserError(f"--{flag} {text!r} is not a list of numbers such as {example}") from None
