"""Measure the error of the samplers against their cost, on data with a known denoiser: a table and two plots.

python benchmarks/sampler_cost.py --out docs/samplers

The samplers integrate from sigma 80 to the data, a mixture of overlapping Gaussians in one dimension. The error is the
root mean square deviation of the means of cos(k x) and sin(k x), k = 1..3. It is computed by quadrature, except for
`pc`: its step size depends on norms of images, so it generates images of 256 independent values each, which resolves
errors above 3e-3. The cost is the measured number of network evaluations, where a forward-mode pass counts as 3. The
second plot uses a denoiser with an oscillating error of 5 % of its output scale c_out, as an imperfect network has.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch as th
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cm.io.storage import write_bytes, write_json
from cm.report.plots import line_plot
from cm.samplers import Churn, CountingDenoiser, integrate, make_sampler
from support.gaussian import Mixture
from support.solver_orders import drawn_errors, line_bed, weak_errors

CHURN = {"s_churn": 10.0, "s_tmin": 0.05, "s_tmax": 50.0}
METHODS = {                                                         # name -> sampler, its options, rho, churn
    "euler": ("euler", {}, 7.0, {}),
    "heun": ("heun", {}, 7.0, {}),
    "heun, churn 10": ("heun", {}, 7.0, CHURN),
    "dpm": ("dpm", {}, 7.0, {}),
    "ancestral": ("ancestral", {}, 7.0, {}),
    "sde": ("sde", {}, 7.0, {}),
    "ito": ("ito", {}, 7.0, {}),
    "ito, rho 3": ("ito", {}, 3.0, {}),
    "ito, eta 0": ("ito", {"eta": 0.0}, 7.0, {}),
    "ddim": ("ddim", {}, 7.0, {}),
    "ddim, eta 1": ("ddim", {"eta": 1.0}, 7.0, {}),
    "pc, ve": ("pc", {}, 7.0, {}),
    "pc, vp": ("pc", {"pc_sde": "vp"}, 7.0, {}),
}
BUDGETS = (8, 16, 32, 64, 128, 256)                                 # network evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="folder for cost.json, cost.png and cost_imperfect.png")
    args = parser.parse_args()
    th.set_num_threads(1)
    bed = line_bed()
    panels = {"exact denoiser": bed.D, "imperfect denoiser": imperfect(bed)}
    results = {
        panel: {name: curve(name, bed, D) for name in tqdm(METHODS, panel, unit="sampler")}
        for panel, D in panels.items()
    }
    for panel, curves in results.items():
        print(f"\n{panel}\n\n{table(curves)}")
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "cost.json", {"budgets": BUDGETS, "churn": CHURN, **results})
        for panel, file in zip(results, ("cost.png", "cost_imperfect.png")):
            picture = line_plot(results[panel], "network evaluations", f"error of the law, {panel}", log=True)
            write_bytes(folder / file, picture)


def imperfect(bed: Mixture, size: float = 0.05, sigma_data: float = 0.5) -> Any:
    def D(x: Tensor, sigma: Tensor) -> Tensor:
        t = sigma.reshape(-1, 1)
        c_out = t * sigma_data / (t**2 + sigma_data**2).sqrt()
        return bed.D(x, sigma) + size * c_out * (4 * x / (t**2 + sigma_data**2).sqrt()).sin()

    return D


def curve(name: str, bed: Mixture, D: Any) -> list[tuple[int, float]]:
    """(evaluations, error) for as many steps as each budget allows."""
    kind, options, rho, churn = METHODS[name]
    sampler, points = make_sampler(kind, options), []
    one, two = evaluations(sampler, 3), evaluations(sampler, 4)
    for budget in BUDGETS:
        steps = 3 + (budget - one) // (two - one)
        if steps >= 2:
            if kind == "pc":
                errors = drawn_errors(sampler, steps, bed, D)
            else:
                errors = weak_errors(sampler, steps, bed, D, rho=rho, churn=churn)
            points.append((evaluations(sampler, steps), errors.square().mean().sqrt().item()))
    return points


def evaluations(sampler: Any, steps: int) -> int:
    D = CountingDenoiser(lambda x, sigma: x / 2)
    integrate(sampler, D, th.ones(1, 1), sampler.grid(steps, 0.002, 80.0, 7.0), th, churn=Churn())
    return D.calls


def table(curves: dict) -> str:
    lines = [f"| sampler | {' | '.join(f'≤ {budget}' for budget in BUDGETS)} |", "|---" * (len(BUDGETS) + 1) + "|"]
    for name, points in curves.items():
        cells = [""] * (len(BUDGETS) - len(points)) + [f"{error:.1e}" for _, error in points]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
