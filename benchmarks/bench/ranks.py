"""Ranks of one machine: the same batch shared out, and as much for each rank as one has alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch as th

from bench.children import BENCHMARKS
from bench.lines import Line
from bench.network import SPECS
from bench.timing import take_turns
from bench.train import toolkit_job
from cm.distributed import setup as dist


def rank_lines(device: th.device, repeats: int) -> list[Line]:
    """Images/s on 1 rank of all threads and on as many ranks of one thread, and on 1 rank of one thread."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    cores = th.get_num_threads()
    if device.type != "cpu" or cores < 2 or not mpiexec.exists():
        return []
    batch = SPECS["cpu"].batch
    whole = images_per_second(mpiexec, 1, cores, batch, repeats)
    shared = images_per_second(mpiexec, cores, 1, batch // cores, repeats)
    alone = images_per_second(mpiexec, 1, 1, batch // cores, repeats)
    each = batch // cores
    return [
        Line("scale", f"1 rank of {cores} threads, batch {batch}", batch / whole, whole),
        Line("scale", f"{cores} ranks of 1 thread, batch {each} each", batch / shared, shared,
             note=f"{shared / whole:.2f} of the speed of 1 rank of {cores} threads"),
        Line("scale", f"1 rank of 1 thread, batch {each}", each / alone, alone,
             note=f"{cores} ranks reach {shared / (cores * alone):.2f} of {cores} times its speed"),
    ]


def images_per_second(mpiexec: Path, ranks: int, threads: int, batch: int, repeats: int) -> float:
    """Of a training step of the benchmark's network, all ranks together."""
    code = f"from bench.ranks import time_a_rank; time_a_rank({batch}, {repeats})"
    done = subprocess.run(
        [str(mpiexec), "-n", str(ranks), sys.executable, "-c", code], cwd=BENCHMARKS, check=True,
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def time_a_rank(batch: int, repeats: int) -> None:
    """Print images/s of all ranks, `batch` on each."""
    def main() -> None:
        dist.setup_dist(device="cpu")                   # there may be fewer GPUs than cores
        spec, device = SPECS["cpu"], dist.dev()
        job = toolkit_job("edm", spec, device, spec.images(device, batch), "fp32")
        seconds = take_turns({"step": job}, device, repeats)["step"].median
        if dist.is_main():
            print(batch * dist.get_world_size() / seconds)

    dist.run(main)
