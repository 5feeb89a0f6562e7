"""How well the model of bench.scaling predicts ranks of this machine: their messages by gloo, and their steps.

The rate and the latency of messages are fitted to small and large ones, and those between are predicted. Computing is
timed on one rank, and steps of two and four ranks, which share the cores, are predicted from both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from tqdm.auto import tqdm

from bench.children import BENCHMARKS
from bench.network import SPECS
from bench.scaling import FLOAT, all_reduce
from bench.timing import take_turns
from bench.train import toolkit_job
from cm.distributed import setup as dist

RANKS = (1, 2, 4)
SIZES = tuple(FLOAT * 4**power for power in range(0, 13))           # bytes: 4 to 64 MiB
HELD_OUT = SIZES[5:11:2]                                            # what the fit does not see
BATCH, REPEATS = 32, 9


def measure() -> dict[str, Any]:
    """Run the ranks, fit and predict: {"ranks": {n: {...}}, "cores": ...}."""
    cores = os.cpu_count() or 1
    found = {n: run_ranks(n) for n in tqdm(RANKS, "ranks")}
    computing = found[1]["step"]                                    # of the whole batch, on one core
    weights = found[1]["bytes"]
    for n in RANKS[1:]:
        messages = {int(size): seconds for size, seconds in found[n]["messages"].items()}
        latency, rate = fit({size: t for size, t in messages.items() if size not in HELD_OUT}, n)
        found[n] |= {
            "latency": latency, "rate": rate,
            "messages_predicted": {size: all_reduce(size, n, rate, latency) for size in HELD_OUT},
            "step_predicted": computing / min(n, cores) + all_reduce(weights, n, rate, latency),
        }
    return {"cores": cores, "batch": BATCH, "ranks": {str(n): found[n] for n in RANKS}}


def rows(measured: dict[str, Any]) -> list[str]:
    """Rows of a Markdown table: what was measured, what was predicted."""
    out = ["| ranks | what | measured | predicted |", "|---|---|---|---|"]
    for n, found in measured["ranks"].items():
        if n == "1":
            out.append(f"| 1 | step of {measured['batch']} images, one thread | {found['step']:.2f} s | |")
            continue
        for size, seconds in ((int(size), seconds) for size, seconds in found["messages_predicted"].items()):
            name = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
            out.append(f"| {n} | all-reduce of {name} | {1e3 * found['messages'][str(size)]:.2f} ms "
                       f"| {1e3 * seconds:.2f} ms |")
        out.append(f"| {n} | step | {found['step']:.2f} s | {found['step_predicted']:.2f} s |")
    return out


def fit(seconds: dict[int, float], ranks: int) -> tuple[float, float]:
    """Latency and rate with the least relative squared error of `all_reduce`."""
    sizes, times = np.array(list(seconds), dtype=float), np.array(list(seconds.values()))
    terms = np.stack([np.full_like(sizes, 2 * np.log2(ranks)), 2 * sizes * (ranks - 1) / ranks], 1)
    latency, per_byte = np.linalg.lstsq(terms / times[:, None], np.ones(len(times)), rcond=None)[0]
    return float(latency), float(1 / per_byte)


def run_ranks(n: int) -> dict[str, Any]:
    """What `time_a_rank` prints on `n` ranks of one thread."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    done = subprocess.run(
        [str(mpiexec), "-n", str(n), sys.executable, "-c", "from bench.calibration import time_a_rank; time_a_rank()"],
        cwd=BENCHMARKS, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def time_a_rank() -> None:
    """Print the median seconds of a step and of messages, and the bytes of the weights."""
    def main() -> None:
        dist.setup_dist(device="cpu")                   # there may be fewer GPUs than ranks
        spec, device = SPECS["cpu"], dist.dev()
        job = toolkit_job("edm", spec, device, spec.images(device, BATCH // dist.get_world_size()), "fp32")
        seconds = take_turns({"step": job}, device, REPEATS)["step"].median
        messages = {}
        if dist.get_world_size() > 1:
            contest = {str(size): partial(dist.all_reduce_sum, th.zeros(size // FLOAT)) for size in SIZES}
            messages = {size: times.median for size, times in take_turns(contest, device, REPEATS).items()}
        weights = sum(param.nbytes for param in spec.build(device).parameters())
        if dist.is_main():
            print(json.dumps({"step": seconds, "messages": messages, "bytes": weights}))

    dist.run(main)
