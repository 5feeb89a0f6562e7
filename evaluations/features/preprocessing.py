"""Preprocessing of images for a network: a resize rule and a normalisation, from a JSON file next to the network's.

`NAME.json` next to the network's file NAME, for example dinov2_vitl14.ts.json::

    {"name": "DINOv2 ViT-L/14",
     "resize": {"side": 224, "mode": "bicubic", "antialias": true},
     "range": [0, 1], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

Those are the values of FD-DINOv2 (Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", section
4) as NVlabs/edm2 computes it. The network is then called with float32 [N,3,side,side].

Shapes: N images, H and W height and width, S side.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import Tensor

from cm.errors import UserError
from cm.io import budget, untrusted

MODES = ("bilinear", "bicubic", "area")
KEYS = ("name", "resize", "range", "mean", "std")
RESIZE_KEYS = ("side", "mode", "antialias")
LARGEST_SIDE = 4096                                         # pixels; beyond it one batch would not fit in memory


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 [N,3,H,W] to what a network takes.

    :param side: pixels of the square that images are resized to; None to leave them as they are.
    :param antialias: average over the pixels that a smaller image loses; `area` always does, and takes no such word.
    :param low, high: what 0 and 255 become, before mean and std.
    :param mean, std: per channel, in units of that range.
    """

    side: int | None = None
    mode: str = "bicubic"
    antialias: bool = True
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    name: str | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N,3,H,W] -> float32 [N,3,S,S]."""
        x = images.float()
        if self.side is not None and self.mode == "area":
            x = F.interpolate(x, (self.side, self.side), mode="area")
        elif self.side is not None:
            x = F.interpolate(x, (self.side, self.side), mode=self.mode, align_corners=False, antialias=self.antialias)
        x = x / 255 * (self.high - self.low) + self.low
        mean, std = (th.tensor(each, device=x.device).view(3, 1, 1) for each in (self.mean, self.std))
        return (x - mean) / std

    @property
    def rule(self) -> str:
        """The resize rule in words."""
        if self.side is None:
            return "none"
        antialiased = "" if self.mode == "area" else ", antialiased" if self.antialias else ", not antialiased"
        return f"{self.mode} to {self.side}x{self.side}{antialiased}"

    @property
    def identity(self) -> str:
        """All that changes features, as a text to hash."""
        return json.dumps([self.side, self.mode, self.antialias, self.low, self.high, self.mean, self.std])


def sidecar_of(path: str) -> str:
    """The path of the description of a network's file."""
    return f"{path}.json"


def read_preprocessing(path: str) -> Preprocessing | None:
    """The description next to a network's file; None if there is none.

    :raises UserError: if it is not as the head of this module shows; the message says what is wrong and what may stand.
    """
    sidecar = sidecar_of(path)
    if not os.path.exists(sidecar):
        return None
    try:
        content = budget.read_json(sidecar, budget.SETTINGS)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{sidecar} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{sidecar} is not JSON: {error}") from None
    return _Reader(sidecar).preprocessing(content)


class _Reader:
    """Checks the values of one file."""

    def __init__(self, path: str):
        self.path = path

    def refuse(self, key: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self.path}: {key} is {untrusted.shown(value)}, but must be {expected}")

    def preprocessing(self, content: Any) -> Preprocessing:
        content = self.table("the file", content, KEYS)
        if not set(content) & {"resize", "range", "mean", "std"}:
            raise UserError(f"{self.path} says nothing about what is done to images: give resize, range, mean and std, "
                            "or remove it")
        low, high = self.numbers("range", content.get("range", [0, 1]), 2)
        if low >= high:
            raise self.refuse("range", content["range"], "[low, high] with low below high, such as [0, 1] or [-1, 1]")
        mean = self.numbers("mean", content.get("mean", [0, 0, 0]), 3)
        std = self.numbers("std", content.get("std", [1, 1, 1]), 3)
        if min(std) <= 0:
            raise self.refuse("std", content["std"], "three numbers above 0, one for each channel")
        name = content.get("name")
        if name is not None and not isinstance(name, str):
            raise self.refuse("name", name, "a text")
        side, mode, antialias = self.resize(content.get("resize"))
        return Preprocessing(side, mode, antialias, low, high, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]),
                             name)

    def resize(self, value: Any) -> tuple[int | None, str, bool]:
        if value is None:
            return None, "bicubic", True
        table = self.table("resize", value, RESIZE_KEYS)
        side, mode = table.get("side"), table.get("mode")
        if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= LARGEST_SIDE:
            raise self.refuse("resize.side", side, f"a number of pixels from 1 to {LARGEST_SIDE}")
        if mode not in MODES:
            raise self.refuse("resize.mode", mode, f"one of {', '.join(MODES)}")
        antialias = table.get("antialias")
        if mode == "area" and antialias is not None:
            raise self.refuse("resize.antialias", antialias, "left out with the mode area, which averages anyway")
        if mode != "area" and not isinstance(antialias, bool):
            raise self.refuse("resize.antialias", antialias, f"true or false with the mode {mode}")
        return side, mode, bool(antialias)

    def table(self, key: str, value: Any, keys: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(key, value, f"an object with the keys {', '.join(keys)}")
        unknown = [each for each in value if each not in keys]
        if unknown:
            raise UserError(f"{self.path}: {key} has the unknown key {untrusted.shown(unknown[0])}; the keys are "
                            f"{', '.join(keys)}")
        return value

    def numbers(self, key: str, value: Any, count: int) -> list[float]:
        if not isinstance(value, list) or len(value) != count or not all(
            isinstance(each, (int, float)) and not isinstance(each, bool) and math.isfinite(each) for each in value
        ):
            raise self.refuse(key, value, f"a list of {count} finite numbers")
        return [float(each) for each in value]
