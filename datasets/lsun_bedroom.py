"""Convert an LSUN database (a folder such as bedroom_train_lmdb) to a folder of square PNG images for --data_dir.

python datasets/lsun_bedroom.py bedroom_train_lmdb data/lsun_bedroom --image-size 256

Image i of the database becomes PREFIX_iiiiiii.png, so the prefix is its class. Run the same command again to resume an
interrupted conversion.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cm.data.decode import centre_crop, decode, why_unreadable
from cm.data.lmdb_file import LmdbFile
from cm.errors import UserError
from cm.generate.grids import save_picture
from cm.io import atomic, storage, terminal
from cm.io.outputs import Output, check_outputs
from cm.io.progress import progress, say

MOST_WORKERS = 256


class Entry(NamedTuple):
    """An image of the database."""

    key: str                                    # its name in the database
    path: Path                                  # where the image is to be written
    data: bytes                                 # an encoded picture; empty if the image exists already


def main(argv: list[str] | None = None) -> None:
    """Convert as the flags say."""
    args = parse(argv)
    if args.image_size < 1 or args.workers < 1:
        raise UserError(f"--image-size {args.image_size} and --workers {args.workers} must be at least 1")
    if args.workers > MOST_WORKERS:
        raise UserError(f"--workers {args.workers}: each is a thread; at most {MOST_WORKERS}")
    if os.sep in args.prefix:
        raise UserError(f"--prefix {args.prefix!r} is the start of a file's name and cannot have a {os.sep}")
    check_outputs([Output("OUT", args.out, "folder")], {"LMDB": args.lmdb})
    database = LmdbFile(args.lmdb)
    storage.make_folder(args.out)
    atomic.remove_old_temporaries(args.out)
    check_side(args.out, args.prefix, args.image_size)
    count = export(database, args.out, args.image_size, args.prefix, args.workers)
    print(
        f"{args.out}: {count['written']} images written, {count['there']} were there already, "
        f"{count['unreadable']} could not be read"
    )
    if not count["written"] + count["there"]:
        raise UserError(f"{args.lmdb}: none of {count['unreadable']} entries is an image")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a command line, by default that of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lmdb", type=Path, help="folder of the database, containing data.mdb")
    parser.add_argument("out", type=Path, help="output folder; created if missing")
    parser.add_argument("--image-size", type=int, default=256, help="width and height in pixels [default: 256]")
    parser.add_argument("--prefix", default="bedroom", help="class; file names start with it [default: bedroom]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="parallel threads [default: one per core]")
    return parser.parse_args(argv)


def check_side(out: Path, prefix: str, image_size: int) -> None:
    """:raises UserError: if the images that are there already have another side, which would stay as they are."""
    there, side = next(iter(sorted(out.glob(f"{glob.escape(prefix)}_*.png"))), None), image_size
    with contextlib.suppress(OSError):                      # which is left alone, too
        side = Image.open(there).width if there else side
    if side != image_size:
        raise UserError(f"--image-size {image_size}: {there} has side {side}, from an earlier conversion, and images "
                        "that are there are kept: choose another folder, or the same size")


def export(database: LmdbFile, out: Path, image_size: int, prefix: str, workers: int) -> Counter:
    """Write all images; returns how many are written, were there, and are unreadable, each of which is named."""
    count: Counter = Counter()
    entries = read_entries(database, out, prefix)
    with (
        ThreadPoolExecutor(workers) as pool,                        # Pillow releases Python's lock
        progress(title="exporting", total=len(database), unit="image") as bar,
    ):
        while chunk := list(islice(entries, 16 * workers)):
            for outcome, complaint in pool.map(lambda entry: convert(entry, image_size), chunk):
                count[outcome] += 1
                if complaint:
                    say(complaint)
            bar.update(len(chunk))
    return count


def read_entries(database: LmdbFile, out: Path, prefix: str) -> Iterator[Entry]:
    """All entries in the order of their keys; unreadable ones keep their number."""
    there = {file.name for file in os.scandir(out)}
    for i, entry in enumerate(database.entries()):
        path = out / f"{prefix}_{i:07d}.png"
        data = b"" if path.name in there else database.value(entry)         # data that is not needed is not read
        yield Entry(entry.key.decode(errors="replace"), path, data)


def convert(entry: Entry, image_size: int) -> tuple[str, str]:
    """Write one image, completely or not at all: the outcome for `export`, and a complaint or nothing."""
    if not entry.data:
        return ("there", "") if entry.path.exists() else ("unreadable", f"{entry.key} is empty: skipped")
    try:
        pixels = centre_crop(decode(entry.data), image_size)        # [S,S,3]
    except MemoryError:
        raise
    except Exception as error:                                      # decoders raise many kinds
        return "unreadable", f"{entry.key} ({entry.path.name}) cannot be read: {why_unreadable(error)}: skipped"
    save_picture(entry.path, Image.fromarray(pixels))
    return "written", ""


if __name__ == "__main__":
    terminal.guard()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
