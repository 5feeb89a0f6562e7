"""Print the tables of docs/scaling.md; with --calibrate, compare the model with measurements on this machine.

python benchmarks/scaling.py --out docs/scaling
python benchmarks/scaling.py --calibrate benchmarks/scaling_cpu.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import calibration
from bench.scaling import (
    ADM64,
    ENGINES,
    GPUS,
    SAVES,
    XXL,
    Cluster,
    Workload,
    efficiency,
    failure_interval,
    goodput,
    limit,
    save_interval,
    save_stall,
    step,
)

from cm.io.storage import write_bytes, write_json
from cm.report.plots import line_plot

CLUSTER = Cluster()
STEP_HEAD = ("GPUs", "engine", "microbatch", "compute", "update", "exposed communication", "images/s", "efficiency",
             "memory", "limited by")
SAVE_HEAD = ("GPUs", "hours between failures", *(f"{save}: stall, interval, goodput" for save in SAVES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to write efficiency.png to")
    parser.add_argument("--calibrate", type=Path, metavar="FILE",
                        help="measure 1, 2 and 4 ranks on this machine, and write the results to this JSON file")
    args = parser.parse_args()
    if args.calibrate:
        measured = calibration.measure()
        write_json(args.calibrate, measured)
        print("\n".join(calibration.rows(measured)))
        return
    for work in (ADM64, XXL):
        print(f"\n### {work.name}\n", *step_rows(work), "", *save_rows(work), sep="\n")
    if args.out:
        args.out.mkdir(exist_ok=True)
        curves = {f"{work.name}, {engine}": [(n, efficiency(work, CLUSTER, n, engine)) for n in GPUS]
                  for work in (ADM64, XXL) for engine in ENGINES}
        write_bytes(args.out / "efficiency.png", line_plot(curves, "GPUs", "images/s per GPU, relative", log=True))


def step_rows(work: Workload, gpus: tuple[int, ...] = (8, 64, 256, 512)) -> list[str]:
    """Rows of a Markdown table: the parts of a step."""
    rows = [row(STEP_HEAD), row(["---"] * len(STEP_HEAD))]
    for n in gpus:
        for engine in ENGINES:
            parts = step(work, CLUSTER, n, engine)
            rows.append(row([
                n, engine, parts.microbatch, *(f"{1e3 * part:.1f} ms" for part in (
                    parts.compute, parts.update, parts.exposed)),
                f"{work.batch / parts.seconds:,.0f}", f"{efficiency(work, CLUSTER, n, engine):.2f}",
                f"{parts.memory / 1e9:.0f} GB", limit(parts),
            ]))
    return rows


def save_rows(work: Workload, gpus: tuple[int, ...] = (8, 64, 512)) -> list[str]:
    """Rows of a Markdown table: what saving and failures cost."""
    rows = [row(SAVE_HEAD), row(["---"] * len(SAVE_HEAD))]
    for n in gpus:
        between = failure_interval(CLUSTER, n)
        cells = []
        for save in SAVES:
            stall = save_stall(work, CLUSTER, n, save)
            minutes = save_interval(work, CLUSTER, n, save) / 60
            cells.append(f"{stall:.2g} s, {minutes:.0f} min, {100 * goodput(work, CLUSTER, n, save):.2f} %")
        rows.append(row([n, f"{between / 3600:,.0f}", *cells]))
    return rows


def row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
