"""Measure how long a save interrupts training: files by rank 0, shares of all ranks, and shares in the background.

mpiexec -n 2 python benchmarks/save_stall.py --parameters 8,32,128,300

The checkpoint is that of a network with one average and Adam: four float32 numbers per parameter, in tensors of a
million. With shares, each rank holds and writes its part; with files, rank 0 holds and writes everything.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch as th
from torch import Tensor

from cm.checkpoints.dcp import Piece
from cm.checkpoints.manager import CheckpointManager
from cm.checkpoints.share_writer import Parts, ShareWriter
from cm.distributed import setup as dist
from cm.distributed.sharding import partition
from cm.logging import logger

MILLION = 10**6
PARTS = {"model": 1, "ema_0.9999": 1, "opt": 2}             # numbers for each parameter
Save = Callable[[int], tuple[float, float]]


def main() -> None:
    """Print a table: for each size and way the median seconds that training waits, and until the save is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", default="8,32,128,300", help="sizes of the network, in millions")
    parser.add_argument("--repeats", type=int, default=5, help="number of saves of each kind")
    parser.add_argument("--folder", help="on a disk that all ranks share [default: the folder for temporary files]")
    options = parser.parse_args()
    dist.setup_dist()
    if dist.is_main():
        print(f"{dist.get_world_size()} ranks; median of {options.repeats} saves, seconds\n")
        print("| parameters | way | training waits | complete after |\n|---:|---|---:|---:|")
    for size in map(int, options.parameters.split(",")):
        for way, make in WAYS.items():
            with tempfile.TemporaryDirectory(dir=options.folder) as own:
                folder = Path(dist.broadcast_object(own)) / "run"
                save = make(folder, size)
                times = [save(step) for step in range(1, options.repeats + 1)]
                dist.barrier()
            waits, total = (statistics.median(column) for column in zip(*times))
            if dist.is_main():
                print(f"| {size} M | {way} | {waits:.3f} | {total:.3f} |", flush=True)


def tensors(numbers: int) -> list[Tensor]:
    """So many millions of numbers."""
    return [th.randn(MILLION) for _ in range(numbers)]


def files(folder: Path, size: int) -> Save:
    """Rank 0 writes; the others wait."""
    manager = CheckpointManager(str(folder), keep=1)
    content = {}
    if dist.is_main():
        content = {name: {str(i): value for i, value in enumerate(tensors(n * size))} for name, n in PARTS.items()}

    def save(step: int) -> tuple[float, float]:
        begun = together()
        manager.save(manager.checkpoint(step, step, {}), content, False)
        waited = time.perf_counter() - begun
        return waited, waited

    return save


def shares(folder: Path, size: int, in_background: bool) -> Save:
    """Every rank writes its share."""
    manager = CheckpointManager(str(folder), keep=1)
    writer = ShareWriter(manager, in_background)
    parts: Parts = {name: own_pieces(n * size) for name, n in PARTS.items()}

    def save(step: int) -> tuple[float, float]:
        begun = together()
        writer.save(manager.checkpoint(step, step, {}), parts, {"trainer": {}}, False)
        waited = time.perf_counter() - begun
        writer.finish()
        return waited, time.perf_counter() - begun

    return save


def own_pieces(numbers: int) -> dict[str, Piece]:
    """Of so many tensors those that this rank writes."""
    mine = partition([MILLION] * numbers, dist.get_rank(), dist.get_world_size()).mine(range(numbers))
    return {str(place): Piece(value, value.shape) for place, value in zip(mine, tensors(len(mine)))}


def together() -> float:
    """The time when all ranks are here."""
    dist.barrier()
    return time.perf_counter()


WAYS: dict[str, Callable[[Path, int], Save]] = {
    "files": files,
    "dcp": lambda folder, size: shares(folder, size, in_background=False),
    "dcp, in the background": lambda folder, size: shares(folder, size, in_background=True),
}


if __name__ == "__main__":
    logger.set_level(logger.WARN)
    dist.run(main)
