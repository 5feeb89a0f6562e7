"""The properties of a set of images that a plan needs: number, sizes, classes, colour, and unreadable files."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from cm.data.decode import why_unreadable
from cm.data.image_source import ImageSource
from cm.data.sources import open_source
from cm.errors import UserError
from cm.io.terminal import printable

LOOK_AT_LEAST = 500                                         # images that are always opened, also in a very short time
SHOWN = 5                                                   # classes or files that are named
SEED = 0


@dataclass(frozen=True)
class Findings:
    """The properties of a set of images.

    :param opened: number of images that were decoded to find them.
    :param sides: least, median and largest shorter side of an image, in pixels.
    :param one_size: the side of all images, if all are squares of this side; 0 otherwise.
    :param grey: whether no image has a colour.
    :param classes: name of each class -> its number of images; empty without classes.
    :param labels_from: where the classes come from.
    :param why_no_classes: the reason if there are none.
    :param damaged: the files that cannot be read, each with the reason.
    """

    data_dir: str
    images: int
    opened: int
    sides: tuple[int, int, int]
    one_size: int
    grey: bool
    classes: dict[str, int] = field(default_factory=dict)
    labels_from: str = ""
    why_no_classes: str = ""
    damaged: tuple[str, ...] = ()

    @property
    def has_classes(self) -> bool:
        """Whether to condition the network on the classes: not on a single one, or almost one for each image."""
        return 1 < len(self.classes) <= self.images / 2

    @property
    def channels(self) -> int:
        """The number of channels of the network for these images."""
        return 1 if self.grey else 3


def look(data_dir: str, labels: str = "auto", seconds: float = 60.0) -> Findings:
    """Open a set of images and decode all of them, or as many as the time allows, spread over the set.

    :param labels: see `open_source`.
    :param seconds: at least `LOOK_AT_LEAST` images are decoded whatever it is.
    :raises UserError: if there is no such set, or none of the images that were opened can be read.
    """
    source = open_source(data_dir, 1, labels=labels)
    end = time.monotonic() + seconds
    sides, odd, damaged, opened = [], False, [], 0
    coloured = False
    for i in np.random.default_rng(SEED).permutation(len(source)).tolist():
        if opened >= LOOK_AT_LEAST and time.monotonic() > end:
            break
        opened += 1
        try:
            image = source.load(i)
        except UserError as error:
            cause = error.__cause__
            reason = why_unreadable(cause) if isinstance(cause, Exception) else str(error)
            damaged.append(f"{source.name(i)} ({reason})")
            continue
        sides.append(min(image.size))
        odd = odd or image.width != image.height
        coloured = coloured or has_colour(image)
    if not sides:
        raise UserError(f"{data_dir}: none of the {opened} images that were opened can be read: {damaged[0]}")
    least, median, largest = min(sides), int(np.median(sides)), max(sides)
    return Findings(
        data_dir, len(source), opened, (least, median, largest), 0 if odd or least < largest else least, not coloured,
        damaged=tuple(sorted(damaged)), **classes_of(source),
    )


def has_colour(image: Image.Image) -> bool:
    """Whether any pixel of an image in RGB or grey has a colour."""
    if image.mode == "L":
        return False
    pixels = np.asarray(image)
    return bool((pixels != pixels[..., :1]).any())


def classes_of(source: ImageSource) -> dict:
    """The fields of `Findings` about classes."""
    if source.labels is None:
        return {"why_no_classes": source.no_labels}
    counts = np.bincount(source.labels, minlength=source.num_classes or 0).tolist()
    names = source.class_names or tuple(map(str, range(len(counts))))
    return {"classes": dict(zip(names, counts)), "labels_from": source.labels_from}


def describe(found: Findings) -> list[str]:
    """The findings as lines of text."""
    least, median, largest = found.sides
    opened = "all opened" if found.opened == found.images else f"{found.opened} of them opened"
    size = f"all {least}x{least}" if found.one_size else f"shorter sides {least} to {largest} pixels, median {median}"
    return [
        f"{found.images} images in {printable(found.data_dir)} ({opened})",
        f"sizes: {size}",
        f"colour: {'grey' if found.grey else 'RGB'}",
        f"classes: {class_line(found)}",
        f"damaged files: {listed(found.damaged) if found.damaged else 'none'}",
    ]


def class_line(found: Findings) -> str:
    """The classes with their numbers of images and where they come from, or why there are none."""
    if not found.classes:
        return f"none: {printable(found.why_no_classes)}"
    if not found.has_classes:
        return (f"left out: {found.images} images would be in {len(found.classes)} class"
                f"{'es' * (len(found.classes) > 1)} (from {found.labels_from})")
    words = [f"{printable(name)} {count}" for name, count in found.classes.items()]
    return f"{len(words)}, from {found.labels_from}: {listed(words)}"


def listed(words: tuple[str, ...] | list[str]) -> str:
    """'a, b, c, d, e and 3 more'."""
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


def refuse_damaged(found: Findings) -> None:
    """:raises UserError: if files are damaged; training would fail at the first of them, possibly after hours."""
    if found.damaged:
        raise UserError(
            f"{len(found.damaged)} of {found.opened} images of {found.data_dir} cannot be read, and training would end "
            f"at the first: {listed(found.damaged)}; replace or remove them, and start again"
        )
