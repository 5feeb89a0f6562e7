"""Measure the memory of the evaluator, without its network, for published numbers of images; not a test of speed.

python benchmarks/evaluator_memory.py --num 50000 --ref_num 10000 --size 64

The images are noise, and the features have the size of Inception's but need little computation. The result is the peak
resident memory of this process after the network has been created; Linux only.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator

import numpy as np
from bench import process_memory
from numpy.typing import NDArray

from cm.config.parser import Parser
from cm.distributed import setup as dist
from cm.errors import UserError
from evaluations.engine.npz_writer import write_npz
from evaluations.evaluator import evaluate
from evaluations.features import Features
from evaluations.flags import metric_names
from evaluations.metrics import default_names

LIMIT_GIB = 1.5                                             # for 50,000 images of 64x64
GRID = 8                                                    # the network sees averages over a grid of this size


class Cheap:
    """ReLUs of a random projection of a coarse image: D pooled features, spatial ones and logits."""

    id, name, resize, is_inception = "cheap-0", "a random projection", f"{GRID}x{GRID} averages", False

    def __init__(self, dim: int, spatial: int, classes: int):
        rng = np.random.default_rng(0)
        inside = 3 * GRID**2
        self.pool, self.spatial = (rng.standard_normal((inside, n), np.float32) for n in (dim, spatial))
        self.last = rng.standard_normal((dim, classes), np.float32) / dim

    def extract(self, images: NDArray[np.uint8]) -> Features:
        n, height, width, _ = images.shape
        cells = images.reshape(n, GRID, height // GRID, GRID, width // GRID, 3).mean((2, 4), dtype=np.float32)
        x = cells.reshape(n, -1) / 255
        pool = np.maximum(x @ self.pool, 0)
        return Features(pool, np.maximum(x @ self.spatial, 0), pool @ self.last)


def write_noise(path: str, count: int, size: int, seed: int) -> None:
    """An npz of noise images, never all in memory."""
    rng = np.random.default_rng(seed)

    def fill(archive: zipfile.ZipFile) -> None:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            form = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(member, form)
            for batch in batches(count):
                member.write(rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8).tobytes())

    write_npz(path, fill)


def batches(count: int, most: int = 256) -> Iterator[int]:
    return (min(most, count - first) for first in range(0, count, most))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, default, text in (
        ("num", 50000, "samples"), ("ref_num", 10000, "reference images"), ("size", 64, "pixels of a side"),
        ("dim", 2048, "pooled features"), ("spatial_dim", 2023, "spatial features"), ("classes", 1008, "classes"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} [default: {default}]")
    parser.add_argument("--metrics", type=metric_names, default="all",
                        help=f"all: {','.join(default_names())} [default: all]")
    args = parser.parse_args()
    if args.size % GRID:
        raise UserError(f"--size {args.size} must be a multiple of {GRID}")
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("ref", args.ref_num), ("sample", args.num)):
            write_noise(f"{folder}/{name}.npz", count, args.size, seed=count)
        network = Cheap(args.dim, args.spatial_dim, args.classes)
        network.extract(np.zeros((64, args.size, args.size, 3), np.uint8))
        process_memory.forget_peak()
        before = process_memory.resident_mib()
        result = evaluate(f"{folder}/ref.npz", f"{folder}/sample.npz", network, progress=True,
                          metrics=args.metrics)
        peak = (process_memory.peak_mib() - before) / 2**10
    print(f"{args.num} samples and {args.ref_num} reference images of {args.size}x{args.size}, {args.dim} features, "
          f"{', '.join(result['metrics'])}: {peak:.2f} GiB beyond the network, in {result['seconds']:.0f} s")


if __name__ == "__main__":
    dist.run(main)
