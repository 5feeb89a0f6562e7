"""Convert a data set to a StyleGAN zip or folder: PNG images of one size, with their classes in dataset.json.

python datasets/dataset_tool.py --source cifar-10-python.tar.gz --dest cifar10-32x32.zip
python datasets/dataset_tool.py --source imagenet/train --dest imagenet-64x64.zip --resolution 64x64 \\
    --transform center-crop

Flags, names and files are those of NVlabs/edm's tool; the same source gives the same bytes. The destination is created
only when it is complete. Exit status: 0 if all images were converted; 3 if some could not be read (each is named on
stderr); 1 if nothing was written; 2 for wrong flags.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from PIL import Image

from cm.data.decode import MODES, why_unreadable
from cm.data.destinations import Destination, output_of, write_labels, writing
from cm.data.raw import open_raw
from cm.data.raw_images import RawImages
from cm.errors import UserError
from cm.io import terminal
from cm.io.outputs import check_outputs
from cm.io.progress import progress, say
from cm.io.terminal import without_controls

TRANSFORMS = ("none", "center-crop", "center-crop-wide")
MOST_WORKERS = 256
SOME_UNREADABLE = 3                             # exit status
CHUNK = 16                                      # images that a process is given at a time


# ---- one image ----


class Shape(NamedTuple):
    """A size in pixels."""

    width: int
    height: int


def parse_resolution(text: str) -> Shape:
    """'64x48' or '64,48' as a shape; '64' is 64x64.

    :raises argparse.ArgumentTypeError: for any other text.
    """
    match = re.fullmatch(r"(\d+)(?:[x,](\d+))?", text)
    if not match or not int(match[1]) or not int(match[2] or match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form WxH, such as 64x64")
    return Shape(int(match[1]), int(match[2] or match[1]))


def resize(image: Image.Image, size: Shape | None) -> Image.Image:
    """The image in another size; None leaves it as it is."""
    return image if size is None or image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def center_crop(image: Image.Image, size: Shape) -> Image.Image:
    """The largest square in the middle, in RGB, resized."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.convert("RGB").crop((left, top, left + side, top + side)), size)


def center_crop_wide(image: Image.Image, size: Shape) -> Image.Image | None:
    """The middle rows in the proportions of `size`, resized, with black bars above and below that make a square.

    None if the image is smaller than that.
    """
    rows = round(size.width * image.height / image.width)
    if image.width < size.width or rows < size.height:
        return None
    top = (image.height - rows) // 2
    middle = resize(image.convert("RGB").crop((0, top, image.width, top + rows)), size)
    canvas = Image.new("RGB", (size.width, size.width))
    canvas.paste(middle, (0, (size.width - size.height) // 2))
    return canvas


def transform(image: Image.Image, kind: str, size: Shape | None) -> Image.Image | None:
    """An image as --transform and --resolution ask for it; None if it is too small for that.

    :param size: None only for the kind "none".
    """
    if kind == "none" or size is None:
        return resize(image, size)
    return center_crop(image, size) if kind == "center-crop" else center_crop_wide(image, size)


def to_channels(image: Image.Image, channels: int | None) -> Image.Image:
    """The image in grey for 1 channel, by its luma, and in RGB for 3; None leaves it as it is."""
    return image if channels is None or image.mode == MODES[channels] else image.convert(MODES[channels])


class Made(NamedTuple):
    """The result for image i: its PNG, or a complaint why there is none; neither if it was too small."""

    i: int
    png: bytes = b""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    complaint: str = ""


def make(i: int, source: RawImages, kind: str, size: Shape | None, channels: int | None = None) -> Made:
    """Read, transform and encode image i."""
    try:
        image = source.image(i)
    except MemoryError:
        raise
    except Exception as error:                                      # decoders raise many kinds
        return Made(i, complaint=why_unreadable(error))
    image = transform(image, kind, size)
    if image is None:
        return Made(i)
    image = to_channels(image, channels)
    file = io.BytesIO()
    image.save(file, format="png", compress_level=0, optimize=False)        # stored: fast to read in training
    return Made(i, file.getvalue(), image.mode, image.size)


_make: Callable[[int], Made] | None = None      # in a process of the pool: `make` with all arguments but the number


def start_worker(source: RawImages, kind: str, size: Shape | None, channels: int | None = None) -> None:
    """Prepare a process of the pool for `make_in_worker`, so that the source is sent to it only once."""
    global _make
    _make = partial(make, source=source, kind=kind, size=size, channels=channels)


def make_in_worker(i: int) -> Made:
    """`make` for image i, in a process that `start_worker` has prepared."""
    assert _make is not None, "the pool calls `start_worker` first"
    return _make(i)


# ---- all images ----


def member_name(i: int) -> str:
    """The name of image i; a folder has 1000 images."""
    return f"{i // 1000:05d}/img{i:08d}.png"


class Uniform:
    """Checks that all images are alike: square, with a power of two as side, all gray or all in color."""

    def __init__(self, source: RawImages):
        self.source = source
        self.first: Made | None = None

    def check(self, made: Made) -> None:
        """:raises UserError: if this image is not like the first one; the message names both."""
        name, (width, height) = self.source.name(made.i), made.size
        if self.first is None:
            self.first = made
            if width != height:
                raise UserError(f"{name} is {width}x{height}, and images must be square: "
                                "give --transform center-crop with --resolution")
            if width & (width - 1):
                raise UserError(f"{name} is {width}x{height}, and sides must be powers of two: give --resolution")
        elif (made.size, made.mode) != (self.first.size, self.first.mode):
            raise UserError(
                f"all images must have the same size and channels, but {self.source.name(self.first.i)} is "
                f"{describe(self.first)} and {name} is {describe(made)}: give --transform center-crop with "
                "--resolution, which makes them so"
            )


def describe(made: Made) -> str:
    """'64x64 RGB', for an error message."""
    return f"{made.size[0]}x{made.size[1]} {'grey' if made.mode == 'L' else 'RGB'}"


def convert(
    source: RawImages, dest: Destination, count: int, kind: str, size: Shape | None, workers: int,
    channels: int | None = None,
) -> Counter:
    """Write the first `count` images and their labels; returns how many are written, too small, and unreadable.

    Image i of the source keeps its number even if earlier ones are left out.

    :raises UserError: if the images are not alike, or none can be used.
    """
    outcomes: Counter = Counter()
    labels, uniform = [], Uniform(source)
    with (
        multiprocessing.Pool(workers, start_worker, (source, kind, size, channels)) as pool,
        progress(title="converting", total=count, unit="image") as bar,
    ):
        for made in pool.imap(make_in_worker, range(count), CHUNK):
            bar.update()
            if made.complaint:
                outcomes["unreadable"] += 1
                say(f"{source.name(made.i)} cannot be read: {made.complaint}: left out")
            elif not made.png:
                outcomes["too small"] += 1
            else:
                uniform.check(made)
                dest.write(member_name(made.i), made.png)
                if source.labels:
                    labels.append((member_name(made.i), source.labels[made.i]))
                outcomes["written"] += 1
    if not outcomes["written"]:
        raise UserError(f"none of {count} images could be used: {summary(outcomes)}")
    write_labels(dest, labels, source.class_names)
    return outcomes


def summary(outcomes: Counter) -> str:
    """The counts of `convert` as text."""
    return (f"{outcomes['written']} images written, {outcomes['too small']} too small and left out, "
            f"{outcomes['unreadable']} unreadable and left out")


def main(argv: list[str] | None = None) -> int:
    """Convert as the flags say; returns the exit status."""
    args = parse(argv)
    check_flags(args)
    check_outputs([output_of(args.dest)], {"--source": args.source})
    source = open_raw(args.source, args.max_images)
    count = min(len(source), args.max_images or len(source))
    with writing(args.dest) as dest:
        outcomes = convert(source, dest, count, args.transform, args.resolution, args.workers, args.channels)
    classes = f"{len({str(label) for label in source.labels})} classes" if source.labels else "no classes"
    print(without_controls(f"{args.dest}: {summary(outcomes)}; {classes}"))
    return SOME_UNREADABLE if outcomes["unreadable"] else 0


def check_flags(args: argparse.Namespace) -> None:
    """:raises UserError: for flags that contradict each other, or numbers below 1."""
    if args.transform != "none" and args.resolution is None:
        raise UserError(f"--transform {args.transform} needs --resolution, such as 64x64")
    if args.resolution and args.transform != "center-crop-wide" and args.resolution.width != args.resolution.height:
        raise UserError(f"--resolution {args.resolution.width}x{args.resolution.height}: images must be square; only "
                        "--transform center-crop-wide, which adds black bars, takes another shape")
    if args.workers > MOST_WORKERS:
        raise UserError(f"--workers {args.workers}: each is a process; at most {MOST_WORKERS}")
    if args.workers < 1 or (args.max_images is not None and args.max_images < 1):
        raise UserError(f"--workers {args.workers} and --max-images {args.max_images} must be at least 1")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a command line, by default that of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, metavar="PATH",
                        help="cifar-10-python.tar.gz, train-images-idx3-ubyte.gz, an lmdb folder, a folder or a .zip")
    parser.add_argument("--dest", required=True, metavar="PATH", help="a .zip, or a new or empty folder")
    parser.add_argument("--resolution", type=parse_resolution, metavar="WxH",
                        help="size of the output images [default: unchanged]")
    parser.add_argument("--transform", choices=TRANSFORMS, default="none",
                        help="how images are cropped; none: they are only resized [default: none]")
    parser.add_argument("--channels", type=int, choices=tuple(MODES),
                        help="1: all images in grey, 3: all in RGB [default: unchanged, but RGB when cropped]")
    parser.add_argument("--max-images", type=int, metavar="N", help="convert only the first N images [default: all]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes [default: one per core]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    terminal.guard()
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(status)
