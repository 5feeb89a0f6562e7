"""Measure a training step while other programs use the same cores, for different ways to wait at an OpenMP barrier.

nice -n 0 python benchmarks/busy_threads.py --log_dir runs/busy_threads

Each measurement runs edm_train.py in its own process: on idle cores and with two busy loops per core, on one rank with
all cores and on two ranks that divide them, with a tiny network and with that of the demo. The time of a step is the
median without the first few steps. Run it on an idle machine.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cm.config.flags import option, parse
from cm.distributed.openmp import BY_THE_USER
from cm.distributed.parent import stop_with_parent
from cm.io.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "toolkit": {},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},     # what it takes without a variable
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
NETWORKS = {
    "tiny": ["--image_size", "16", "--num_channels", "32", "--channel_mult", "1", "--num_res_blocks", "1",
             "--global_batch_size", "4"],
    "demo": ["--config", str(ROOT / "configs/digits/edm.yaml"), "--sample_interval", "0"],
}
WARM_UP = 3                                                 # steps that are not counted


@dataclass(frozen=True)
class BusyConfig:
    """busy cores"""

    steps: int = option(15, "steps of a run", minimum=5)
    ranks: str = option("1,2", "numbers of ranks, comma-separated")
    networks: str = option("tiny,demo", "networks, comma-separated")
    loops_per_core: int = option(2, "busy loops per core", minimum=1)
    log_dir: str = option("busy_threads", "folder for the results")


def main() -> None:
    config = parse(__doc__ or "", BusyConfig).section(BusyConfig)
    folder, rows = Path(config.log_dir), []
    folder.mkdir(parents=True, exist_ok=True)               # before minutes of measurements
    for network in config.networks.split(","):
        for ranks in map(int, config.ranks.split(",")):
            for loops in (0, config.loops_per_core * cores()):
                for way, env in WAYS.items():
                    with busy(loops):
                        seconds = step_seconds(NETWORKS[network], ranks, config.steps, env)
                    row = {"network": network, "ranks": ranks, "loops": loops, "way": way, "seconds": seconds}
                    rows.append(row)
                    print(row, flush=True)
    used = " ".join(["python benchmarks/busy_threads.py", *sys.argv[1:]])
    write_json(folder / "busy_threads.json", {"command": used, "cores": cores(), "rows": with_ratios(rows)})


def with_ratios(rows: list[dict]) -> list[dict]:
    """Each row with its time as a multiple of that of one thread in the same place."""
    def place(row: dict) -> tuple:
        return row["network"], row["ranks"], row["loops"]

    single = {place(row): row["seconds"] for row in rows if row["way"] == "one thread"}
    return [row | {"of_one_thread": round(row["seconds"] / single[place(row)], 3)} for row in rows]


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that do nothing but use a core."""
    loop = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(loop, preexec_fn=stop_with_parent()) for _ in range(loops)]
    try:
        time.sleep(0.5 if loops else 0)
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()


def step_seconds(network: list[str], ranks: int, steps: int, env: dict[str, str]) -> float:
    """The median time of a step of edm_train.py."""
    mine = {name: value for name, value in os.environ.items()
            if name not in (*BY_THE_USER, "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts/edm_train.py"), *network, "--data_dir", "digits",
                   "--total_training_steps", str(steps), "--log_interval", "1", "--log_dir", folder]
        launcher = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks)] if ranks > 1 else []
        subprocess.run(
            [*launcher, *command], env=mine | env, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600,
        )
        with open(Path(folder) / "progress.csv") as file:
            elapsed = [float(row["elapsed_seconds"]) for row in csv.DictReader(file)]
    return round(statistics.median(b - a for a, b in zip(elapsed[WARM_UP:], elapsed[WARM_UP + 1 :])), 4)


def cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
