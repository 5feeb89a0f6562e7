"""Measure what it costs to open a data set as large as ImageNet on each of two ranks, compared with a plain reader.

python benchmarks/large_sets.py --json benchmarks/large_sets.json

Seconds are processor time of all threads of a rank. MiB are the peak memory beyond that of a rank with torch and the
toolkit loaded. The images are tiny, because only the index matters. The plain reader is in the style of EDM's:
zipfile, a sorted list of names, and all labels as a dict; os.walk for folders, and the array in memory for npz files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from bench import process_memory
from bench.children import BENCHMARKS
from PIL import Image

from cm.data.loader import load_data
from cm.data.sources import open_everywhere
from cm.distributed import setup as dist
from cm.io.storage import write_json

IMAGES = 1_281_167                                                  # of ImageNet's training set
CLASSES, SIDE, BATCH = 1000, 10, 32
NAMES_OF_A_FILE = 10_000                                            # ext4 allows 65,000
LOCAL = struct.Struct("<4sHHHHHLLLHH")
CENTRAL = struct.Struct("<4sHHHHHHLLLHHHHHLL")


# --- sets ------------------------------------------------------------------------------------------------------------


def tiny_png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "teal").save(data, "PNG")
    return data.getvalue()


def edm_names(count: int) -> Iterator[tuple[str, int]]:
    """Names and classes as EDM's tool gives them; the classes stand in dataset.json."""
    return ((f"{i // 1000:05d}/img{i:08d}.png", i * CLASSES // count) for i in range(count))


def class_folders(count: int) -> list[tuple[str, int]]:
    """Names in a folder for each class, in no order."""
    named = [(f"n{i * CLASSES // count:08d}/{i:08d}.png", i * CLASSES // count) for i in range(count)]
    random.Random(0).shuffle(named)
    return named


def write_zip(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    """A zip of stored members, made byte by byte: zipfile would take minutes. Its end is that of zip64."""
    directory, count, place = bytearray(), 0, 0
    with open(path, "wb", buffering=2**22) as file:
        for name, data in members:
            crc, size, encoded = zlib.crc32(data), len(data), name.encode()
            head = LOCAL.pack(b"PK\3\4", 20, 0, 0, 0, 33, crc, size, size, len(encoded), 0) + encoded
            directory += CENTRAL.pack(b"PK\1\2", 20, 20, 0, 0, 0, 33, crc, size, size, len(encoded), 0, 0, 0, 0, 0,
                                      place) + encoded
            file.write(head + data)
            count, place = count + 1, place + len(head) + size
        file.write(directory)
        end = place + len(directory)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), place))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), place, 0))


def make_edm_zip(path: Path, count: int) -> None:
    png = tiny_png()
    labels = json.dumps({"labels": list(edm_names(count))}).encode()
    write_zip(path, (pair for part in ([(name, png) for name, _ in edm_names(count)], [("dataset.json", labels)])
                     for pair in part))


def make_class_zip(path: Path, count: int) -> None:
    png = tiny_png()
    write_zip(path, ((name, png) for name, _ in class_folders(count)))


def make_folder(path: Path, count: int) -> None:
    """Many names for few files: an index takes as long, and the disk is not filled."""
    for i in range(CLASSES):
        (path / f"n{i:08d}").mkdir(parents=True)
    names = class_folders(count)
    for start in range(0, count, NAMES_OF_A_FILE):
        first, *others = (path / name for name, _ in names[start : start + NAMES_OF_A_FILE])
        first.write_bytes(tiny_png())
        for name in others:
            os.link(first, name)


def make_npz(path: Path, count: int) -> None:
    np.savez(path, arr_0=np.zeros((count, SIDE, SIDE, 3), np.uint8), arr_1=np.arange(count) * CLASSES // count)


# --- the plain way ---------------------------------------------------------------------------------------------------


def plain_zip(path: str) -> tuple[object, ...]:
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())
    images = sorted(name for name in names if os.path.splitext(name)[1] == ".png")
    if "dataset.json" in names:
        table = dict(json.loads(archive.read("dataset.json"))["labels"])
        return archive, images, np.array([table[name] for name in images])
    return archive, images, folder_labels(images)


def plain_folder(path: str) -> tuple[object, ...]:
    files = {os.path.relpath(os.path.join(root, name), path) for root, _, names in os.walk(path) for name in names}
    images = sorted(name for name in files if os.path.splitext(name)[1] == ".png")
    return images, folder_labels(images)


def folder_labels(images: list[str]) -> np.ndarray:
    return np.unique([name.split("/")[0] for name in images], return_inverse=True)[1]


def plain_npz(path: str) -> tuple[object, ...]:
    arrays = np.load(path)
    return arrays["arr_0"], arrays["arr_1"]


SETS: dict[str, tuple[str, Callable[[Path, int], None], Callable[[str], object]]] = {
    "zip of EDM's tool": ("edm.zip", make_edm_zip, plain_zip),
    "zip with a folder for each class, in no order": ("classes.zip", make_class_zip, plain_zip),
    "folder": ("folder", make_folder, plain_folder),
    "npz": ("set.npz", make_npz, plain_npz),
}


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_rank(path: str, is_plain: bool) -> None:
    """Print what opening the set takes on each rank, and when the first batch is there."""
    def main() -> None:
        dist.setup_dist()
        dist.barrier()
        process_memory.forget_peak()
        held, cpu, begun = process_memory.resident_mib(), time.process_time(), time.perf_counter()
        if is_plain:
            plain = next(way for name, _, way in SETS.values() if path.endswith(name))
            source = plain(path)
        else:
            source = open_everywhere(path, SIDE)
        found = {"cpu_seconds": time.process_time() - cpu, "peak_mib": process_memory.peak_mib() - held}
        if not is_plain:
            next(load_data(data_dir=path, batch_size=BATCH, image_size=SIDE, class_cond=True, num_workers=0,
                           rank=dist.get_rank(), world_size=dist.get_world_size(), source=source))
            found["first_batch_seconds"] = time.perf_counter() - begun
        ranks = dist.all_gather_object(found)
        if dist.is_main():
            print(json.dumps(ranks))

    dist.run(main)


def measured(path: Path, is_plain: bool) -> list[dict[str, float]]:
    """The numbers of each rank; the plain way opens for itself on each, so one is enough."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    code = f"from large_sets import measure_rank; measure_rank({str(path)!r}, {is_plain})"
    done = subprocess.run([str(mpiexec), "-n", "1" if is_plain else "2", sys.executable, "-c", code], cwd=BENCHMARKS,
                          check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"images per data set [default: {IMAGES}]")
    parser.add_argument("--json", default="", help="also write the results to this file")
    args = parser.parse_args(argv)
    rows = []
    for title, (name, make, _) in SETS.items():
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            make(path, args.images)
            first, other, plain = *measured(path, False), *measured(path, True)
        rows.append({"set": title, "images": args.images, "rank_0": first, "other_ranks": other, "plain": plain})
        print(f"{title}, {args.images:,} images")
        for who, numbers in (("rank 0", first), ("other ranks", other), ("plain, every rank", plain)):
            print(f"  {who:<18}" + ", ".join(f"{key} {value:.2f}" for key, value in numbers.items()), flush=True)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
