"""Measure the orders of convergence of the SDE samplers, compared with theory: a table and a plot.

python benchmarks/sampler_orders.py --out docs/samplers

The strong error is the root mean square distance from the solution of the reverse SDE on the same Brownian paths, from
sigma 2 to 0.2, on Gaussian data and on a mixture of overlapping Gaussians. The weak error is the error of E cos 2x at
0.2, on the mixture in one dimension, by quadrature. The tests measure the same with fewer steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch as th
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cm.io.storage import write_bytes, write_json
from cm.report.plots import line_plot
from support.gaussian import Gaussian, Mixture
from support.solver_orders import EXPECTED, SAMPLERS, Paths, line_bed, order, weak_errors

STRONG, WEAK = (16, 32, 64, 128, 256), (8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="folder for orders.json and orders.png; empty: only print")
    parser.add_argument("--paths", type=int, default=500, help="number of Brownian paths")
    parser.add_argument("--fine", type=int, default=2048, help="steps of the reference solution, a multiple of 256")
    args = parser.parse_args()
    th.set_num_threads(1)

    beds = [Paths(bed, args.fine, args.paths) for bed in (Gaussian.stored(), Mixture.stored())]
    rows = {}
    for name, sampler in tqdm(SAMPLERS.items(), "measuring", unit="sampler"):
        gaussian, mixture = (bed.errors(sampler, STRONG) for bed in beds)
        weak = [weak_errors(sampler, n, line_bed(), high=2.0, low=0.2, to_data=False)[2].abs().item() for n in WEAK]
        rows[name] = {
            "orders": [order(STRONG, gaussian), order(STRONG, mixture), order(WEAK[1:], weak[1:])],
            "expected": EXPECTED[name],
            "strong_errors": dict(zip(STRONG, mixture)),
            "weak_errors": dict(zip(WEAK, weak)),
        }
    print(table(rows))
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"paths": args.paths, "fine_steps": args.fine, "samplers": rows}
        write_json(folder / "orders.json", facts)
        curves = {
            f"{name}: order {row['orders'][1]:.2f}": list(row["strong_errors"].items()) for name, row in rows.items()
        }
        picture = line_plot(curves, "steps", "RMS distance from the path, overlapping mixture", log=True)
        write_bytes(folder / "orders.png", picture)


def table(rows: dict) -> str:
    heads = ("sampler", "strong, Gaussian", "strong, mixture", "weak, mixture", "RMS at 256 steps")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        orders = " | ".join(f"{value:.2f} ({e:g})" for value, e in zip(row["orders"], row["expected"]))
        lines.append(f"| {name} | {orders} | {row['strong_errors'][256]:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
