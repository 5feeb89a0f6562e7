"""The networks that a plan chooses from: those of the presets size/*, fitted to the side of the images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cm.config.config_file import read_config
from cm.config.flags import convert
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.quickstart.look import Findings

LEAST_SIDE = 4                                              # of the images on a network's lowest level


@dataclass(frozen=True)
class Size:
    """A preset of `configs/size/`, and when it is worth its time.

    :param least_side: of the images, in pixels.
    :param least_images: with fewer images, it would memorise them.
    :param needs_kimg: thousands of images that a teacher must see before it is better than the next smaller one.
    """

    name: str
    least_side: int
    least_images: int
    needs_kimg: float


SIZES = (
    Size("tiny", 1, 0, 0), Size("small", 16, 500, 50), Size("medium", 32, 5000, 2000), Size("large", 64, 20000, 10000),
)
"""The sizes, from the smallest to the largest. The numbers of images are rules of thumb, not measurements."""


@dataclass(frozen=True)
class Candidate:
    """A network for images of one side."""

    size: Size
    image_size: int

    @property
    def name(self) -> str:
        return self.size.name


def candidates(found: Findings, size: str = "", image_size: int = 0) -> list[Candidate]:
    """The networks that fit the images, from the smallest to the largest; never an empty list.

    :param size: the name of the only one to take; "" for those that the images allow.
    :param image_size: of all of them; 0 for what fits the images and the preset.
    :raises UserError: if no network takes images of that side.
    """
    if image_size and not levels(image_size):
        raise UserError(f"--image_size {image_size}: the networks halve images at least once, to at least "
                        f"{LEAST_SIDE} pixels: give an even number of at least {2 * LEAST_SIDE}, such as 32")
    sizes = [each for each in SIZES if each.name == size] or [
        each for each in SIZES
        if each.least_side <= (image_size or found.sides[1]) and each.least_images <= found.images
    ]
    return [Candidate(each, image_size or fitting_side(found, preset(each.name)["image_size"])) for each in sizes]


def fitting_side(found: Findings, largest: int) -> int:
    """The side for these images, at most `largest`: their own if all have one that a network can halve, else the
    largest power of two that the median image has, and 8 at least.
    """
    if 0 < found.one_size <= largest and levels(found.one_size) >= min(2, levels(largest)):
        return found.one_size
    side = 2 * LEAST_SIDE
    while 2 * side <= min(largest, found.sides[1]):
        side *= 2
    return side


def levels(side: int) -> int:
    """The number of times that images of this side can be halved."""
    count = 0
    while side % 2 == 0 and side // 2 >= LEAST_SIDE:
        side, count = side // 2, count + 1
    return count


def preset(name: str) -> dict[str, Any]:
    """The flags of a preset by size."""
    fields = {field.name: field for section in TRAINING_SECTIONS for field in dataclasses.fields(section)}
    where = f"size/{name}"
    return {flag: convert(type(fields[flag].default), value, f"{where}: {flag}")
            for flag, value in read_config(where, fields).items()}


def network_flags(candidate: Candidate, found: Findings) -> dict[str, Any]:
    """The flags of a candidate's network: the preset's, with as many levels as images of its side have."""
    flags, side = preset(candidate.name), candidate.image_size
    widths = flags["channel_mult"].split(",")[: levels(side) + 1]
    sides = [side >> level for level in range(len(widths))]
    attended = [each for each in sides if str(each) in flags["attention_resolutions"].split(",")] or sides[-1:]
    return {
        **{name: flags[name] for name in ("num_channels", "num_res_blocks", "num_head_channels", "time_scale")},
        "image_size": side, "channels": found.channels, "class_cond": found.has_classes,
        "channel_mult": ",".join(widths), "attention_resolutions": ",".join(map(str, attended)),
    }
