"""Measure speed and memory beside the plain way of doing the same, and beside what the machine can do at most.

python benchmarks/run.py --suite train,sample --out benchmarks
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch as th
from bench.ceiling import measure_ceiling
from bench.lines import Line, ceiling_text, table, write_results
from bench.memory import memory_suite
from bench.network import SPECS
from bench.sample import sample_suite
from bench.train import train_suite

SUITES = {
    "train": lambda spec, device, ceiling, repeats: train_suite(spec, device, ceiling, repeats),
    "sample": lambda spec, device, ceiling, repeats: sample_suite(spec, device, ceiling, repeats),
    "memory": lambda spec, device, ceiling, repeats: memory_suite(device),
}


def main() -> None:
    args = parse()
    device = th.device(args.device)
    if args.threads:
        th.set_num_threads(args.threads)
    spec = SPECS[device.type]
    ceiling = measure_ceiling(device, spec.batch, 2 * spec.num_channels, spec.image_size // 2)
    print(ceiling_text(ceiling))
    suites: dict[str, list[Line]] = {}
    for name in args.suite:
        suites[name] = SUITES[name](spec, device, ceiling, args.repeats)
        print(f"\n{name}\n{table(suites[name])}", flush=True)
    if args.out:
        write_results(Path(args.out), device, ceiling, suites)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SPECS), default="cuda" if th.cuda.is_available() else "cpu")
    parser.add_argument("--suite", type=suite_names, default=list(SUITES), help=f"of {','.join(SUITES)}")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: as torch chooses")
    parser.add_argument("--out", default="", help="folder for the JSON and the Markdown table")
    return parser.parse_args()


def suite_names(words: str) -> list[str]:
    names = words.split(",")
    if wrong := [name for name in names if name not in SUITES]:
        raise argparse.ArgumentTypeError(f"unknown suite {wrong[0]!r}; choose among: {', '.join(SUITES)}")
    return names


if __name__ == "__main__":
    main()
