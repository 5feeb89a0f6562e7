"""Measure the cost of verifying weights: the time to load a file with and without checking its CRC-32.

python benchmarks/verify_cost.py --mebibytes 1024
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping

import torch as th

from cm.checkpoints import serialization
from cm.distributed import setup as dist


def main() -> None:
    """Print the median of both times, and their difference in percent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=1024, help="size of the file in MiB")
    parser.add_argument("--repeats", type=int, default=9, help="number of loads of each kind")
    parser.add_argument("--folder", help="folder for the file [default: the folder for temporary files]")
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile(suffix=".pt", dir=options.folder) as file:
        weights = {f"layer{index}": th.randn(2**18) for index in range(options.mebibytes)}
        facts = serialization.save_tensors(file.name, weights)
        del weights
        plain, verified = [], []
        for _ in range(options.repeats):
            plain.append(seconds(file.name, None))
            verified.append(seconds(file.name, facts))
    before, after = statistics.median(plain), statistics.median(verified)
    print(f"{options.mebibytes} MiB: {before:.3f} s without, {after:.3f} s with CRC-32: {after / before - 1:+.1%}")


def seconds(path: str, facts: Mapping[str, int] | None) -> float:
    """How long one load takes."""
    begun = time.perf_counter()
    dist.load_state_dict(path, expected=facts)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
