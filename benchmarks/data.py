"""Measure the speed of data loading: from a folder, from a zip, and from decoded images in memory.

python benchmarks/data.py                                  # 4096 generated images of 64x64
python benchmarks/data.py --images cifar10-32x32.zip --image_size 32

Each round reads the same images from every source in turn, so that other work on the machine affects all sources
equally. The ratios to the folder are medians over the rounds. All files are read once before, so the numbers are those
of a data set that is in the disk cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cm.data.image_source import ImageSource
from cm.data.loader import load_data
from cm.data.sources import open_source
from cm.io.storage import write_json

TOOL = Path(__file__).resolve().parent.parent / "datasets" / "dataset_tool.py"


def convert(source: Path, dest: Path) -> None:
    """`datasets/dataset_tool.py`, which is a script and no module of a package."""
    spec = importlib.util.spec_from_file_location("dataset_tool", TOOL)
    tool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(["--source", str(source), "--dest", str(dest)])


def make_images(folder: Path, count: int, side: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i % 10}_{i}.png")


def reader(source: ImageSource) -> Callable[[np.ndarray], object]:
    return lambda indices: [source.encoded(i) for i in indices.tolist()]


def loader(path: Path, side: int, batch: int, workers: int, cache_bytes: int) -> Callable[[np.ndarray], object]:
    stream = load_data(
        data_dir=str(path), batch_size=batch, image_size=side, num_workers=workers, cache_bytes=cache_bytes
    )
    return lambda indices: [next(stream) for _ in range(0, len(indices), batch)]


def interleaved(
    stores: dict[str, Callable[[np.ndarray], object]], parts: list[np.ndarray]
) -> dict[str, list[float]]:
    """Seconds of each store for each part."""
    seconds = {name: [] for name in stores}
    for part in parts:
        for name, read in stores.items():
            start = time.perf_counter()
            read(part)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(folder: Path, archive: Path, side: int, rounds: int, batch: int) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds an image, and the ratio to the folder, by kind of work and store."""
    def opened(path: Path, cache_bytes: int) -> ImageSource:
        source = open_source(str(path), side)
        source.keep_decoded(cache_bytes)
        source.images(np.arange(len(source)))                       # into the disk cache, and the other one
        return source

    unlimited = 1 << 62
    plain = {"folder": opened(folder, 0), "zip": opened(archive, 0)}
    kept = opened(archive, unlimited)
    count = len(kept)
    order = np.random.default_rng(1).permutation(count)
    parts = np.array_split(order[: count - count % rounds], rounds)
    work = {
        "bytes of the files": {name: reader(source) for name, source in plain.items()},
        "decoded images": {name: source.images for name, source in [*plain.items(), ("kept in memory", kept)]},
        "batches, one worker": {name: loader(path, side, batch, 1, 0)
                                for name, path in (("folder", folder), ("zip", archive))},
        "batches, no worker": {
            "folder": loader(folder, side, batch, 0, 0), "zip": loader(archive, side, batch, 0, 0),
            "kept in memory": loader(archive, side, batch, 0, unlimited),
        },
    }
    found = {}
    for title, stores in work.items():
        if title.startswith("batches"):
            interleaved(stores, [order])                            # a whole epoch: workers are up, memory is filled
        seconds = interleaved(stores, parts)
        found[title] = {
            name: {
                "microseconds": statistics.median(times) / len(parts[0]) * 1e6,
                "ratio": statistics.median(mine / base for mine, base in zip(times, seconds["folder"])),
            }
            for name, times in seconds.items()
        }
    return found


def measure_images(source: Path, side: int, rounds: int, batch: int) -> dict[str, dict[str, dict[str, float]]]:
    """As `measure`, with a folder and a zip made of the images of `source`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, archive = Path(scratch) / "folder", Path(scratch) / "images.zip"
        convert(source, folder)
        convert(source, archive)
        return measure(folder, archive, side, rounds, batch)


def measure_noise(count: int, side: int, rounds: int, batch: int) -> dict[str, dict[str, dict[str, float]]]:
    with tempfile.TemporaryDirectory() as scratch:
        make_images(Path(scratch) / "source", count, side)
        return measure_images(Path(scratch) / "source", side, rounds, batch)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="", help="folder or zip of images [default: random images]")
    parser.add_argument("--count", type=int, default=4096, help="number of random images [default: 4096]")
    parser.add_argument("--image_size", type=int, default=64, help="side in pixels [default: 64]")
    parser.add_argument("--batch_size", type=int, default=128, help="images per batch [default: 128]")
    parser.add_argument("--rounds", type=int, default=8, help="number of rounds [default: 8]")
    parser.add_argument("--json", default="", help="also write the results to this file")
    args = parser.parse_args(argv)
    if args.images:
        found = measure_images(Path(args.images), args.image_size, args.rounds, args.batch_size)
    else:
        found = measure_noise(args.count, args.image_size, args.rounds, args.batch_size)
    for title, stores in found.items():
        print(title)
        for name, numbers in stores.items():
            print(f"  {name:<16}{numbers['microseconds']:>9.1f} us/image {numbers['ratio']:>6.2f} of the folder's time")
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
