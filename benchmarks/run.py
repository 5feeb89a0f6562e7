"""Measure speed and memory, compared with a plain implementation and with the maximum speed of the machine.

python benchmarks/run.py --suite train,sample --out benchmarks
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch as th
from bench.ceiling import Ceiling, measure_ceiling
from bench.evaluation import eval_suite
from bench.launches import launches_suite
from bench.lines import table
from bench.loading import data_suite
from bench.memory import memory_suite
from bench.network import SPECS, NetworkSpec
from bench.objectives import objectives_suite
from bench.results import ceiling_text, keep
from bench.sample import sample_suite
from bench.scale import scale_suite
from bench.train import train_suite

from cm.distributed import setup as dist

SUITES = {
    "train": lambda job: train_suite(job.spec, job.device, job.ceiling, job.repeats),
    "objectives": lambda job: objectives_suite(job.spec, job.device, job.ceiling, job.repeats),
    "sample": lambda job: sample_suite(job.spec, job.device, job.ceiling, job.repeats),
    "eval": lambda job: eval_suite(job.device, job.repeats),
    "data": lambda job: data_suite(job.spec.image_size),
    "launches": lambda job: launches_suite(job.spec),
    "memory": lambda job: memory_suite(job.device),
    "scale": lambda job: scale_suite(job.device, job.repeats, job.out and job.out / "scale"),
}


@dataclass(frozen=True)
class Job:
    """What a suite is run with."""

    spec: NetworkSpec
    device: th.device
    ceiling: Ceiling
    repeats: int
    out: Path | None                                        # folder of tables and pictures


def main() -> None:
    args = parse()
    device = th.device(args.device)
    dist.setup_dist(device=args.device)                # its settings of the process, which every command takes
    if args.threads:
        th.set_num_threads(args.threads)
    spec = SPECS[device.type]
    ceiling = measure_ceiling(device, spec.batch, 2 * spec.num_channels, spec.image_size // 2)
    job = Job(spec, device, ceiling, args.repeats, Path(args.out) if args.out else None)
    if job.out is not None:
        job.out.mkdir(parents=True, exist_ok=True)
    print(ceiling_text(asdict(ceiling)))
    for name in args.suite:
        lines = SUITES[name](job)
        print(f"\n{name}\n{table(lines)}", flush=True)
        if job.out is not None:
            keep(job.out, name, lines, device, ceiling)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SPECS), default="cuda" if th.cuda.is_available() else "cpu")
    parser.add_argument("--suite", type=suite_names, default=list(SUITES),
                        help=f"comma-separated, from {','.join(SUITES)}; without it: all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--threads", type=int, default=0, help="number of torch's threads; 0: torch's choice")
    parser.add_argument("--out", default="", help="folder for JSON, RESULTS.md and pictures")
    return parser.parse_args()


def suite_names(words: str) -> list[str]:
    names = words.split(",")
    if wrong := [name for name in names if name not in SUITES]:
        raise argparse.ArgumentTypeError(f"unknown suite {wrong[0]!r}; choose among: {', '.join(SUITES)}")
    return names


if __name__ == "__main__":
    main()
