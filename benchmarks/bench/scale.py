"""How the time of a training step grows, one thing at a time, beside the law that it should follow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch as th

from bench.lines import Line
from bench.network import NetworkSpec, forward_flops
from bench.timing import take_turns
from bench.train import toolkit_job
from cm.line_plot import line_plot

SMALL = NetworkSpec(16, 32, "1,2", 1, 32, "8", 16)           # so that the largest point of an axis stays short
WIDE = 0.10                                                 # a deviation that the line names


@dataclass(frozen=True)
class Axis:
    """One thing that grows.

    :param jobs: value -> what is timed.
    :param law: value -> a number in proportion to the expected time.
    """

    name: str
    jobs: Mapping[int, Callable[[], None]]
    law: Callable[[int], float]
    law_text: str


def axes(device: th.device) -> list[Axis]:
    """Every axis that one process can measure."""
    def step(spec: NetworkSpec, **options: object) -> Callable[[], None]:
        return toolkit_job("edm", spec, device, spec.images(device), "fp32", **options)

    def sized(side: int) -> NetworkSpec:
        return replace(SMALL, image_size=side, attention_resolutions=str(side // 2))

    def flops(side: int) -> float:
        spec = sized(side)
        return forward_flops(spec.build(th.device("cpu")), spec.images(th.device("cpu"), 1))

    batches, sides, averages, scales = (8, 16, 32, 64), (8, 16, 32), (1, 2, 4, 8), (11, 41, 161, 641)
    return [
        Axis("batch", {n: step(replace(SMALL, batch=n)) for n in batches}, float, "in proportion"),
        Axis("image side", {side: step(sized(side)) for side in sides}, flops, "in proportion to the FLOPs"),
        Axis("weight averages", {n: step(SMALL, ema_rates=(0.999,) * n) for n in averages}, lambda n: 1.0,
             "constant, but for one pass over the weights each"),
        Axis("N of consistency training", {
            n: toolkit_job("consistency_training", SMALL, device, SMALL.images(device), "fp32", scales=n)
            for n in scales
        }, lambda n: 1.0, "constant"),
    ]


def scale_suite(device: th.device, repeats: int, out: Path | None) -> list[Line]:
    """A line for each point; a picture for each axis in `out`."""
    lines = []
    for axis in axes(device):
        times = take_turns({str(value): job for value, job in axis.jobs.items()}, device, repeats)
        seconds = {value: times[str(value)].median for value in axis.jobs}
        lines += lines_of(axis, seconds)
        if out is not None:
            draw(axis, seconds, out)
    return lines + rank_lines(device, repeats)


def lines_of(axis: Axis, seconds: Mapping[int, float]) -> list[Line]:
    """Each point beside the law through the last one, where fixed costs weigh least."""
    last = max(seconds)
    unit = seconds[last] / axis.law(last)
    lines = []
    for value, took in seconds.items():
        off = took / (unit * axis.law(value)) - 1
        note = f"law: {axis.law_text}; {off:+.0%}" + (" (outside 10 %)" if abs(off) > WIDE else "")
        lines.append(Line("scale", f"{axis.name} {value}", took, note=note))
    return lines


def draw(axis: Axis, seconds: Mapping[int, float], out: Path) -> None:
    last = max(seconds)
    unit = seconds[last] / axis.law(last)
    curves = {
        "measured": list(seconds.items()),
        f"law: {axis.law_text}": [(value, unit * axis.law(value)) for value in seconds],
    }
    name = axis.name.replace(" ", "_")
    line_plot(curves, axis.name, "seconds per step").save(out / f"scale_{name}.png")


def rank_lines(device: th.device, repeats: int) -> list[Line]:
    """The same global batch on 1 rank of all threads and on as many ranks of one thread."""
    if device.type != "cpu":
        return []
    cores = th.get_num_threads()
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if cores < 2 or not mpiexec.exists():
        return []
    code = "from bench.scale import time_a_rank; time_a_rank({repeats}, {threads})"
    speeds: dict[int, float] = {}
    for ranks in (1, cores):
        job = code.format(repeats=repeats, threads=cores // ranks)
        done = subprocess.run(
            [str(mpiexec), "-n", str(ranks), sys.executable, "-c", job], cwd=sys.path[0], check=True,
            capture_output=True, text=True,
        )
        speeds[ranks] = float(done.stdout.strip().splitlines()[-1])
    return [
        Line("scale", f"{ranks} rank(s) of {cores // ranks} thread(s)", 0.0, speed,
             note=f"{speed / speeds[1]:.2f} of one process")
        for ranks, speed in speeds.items()
    ]


def time_a_rank(repeats: int, threads: int) -> None:
    """Print images/s of the benchmark's network, the batch shared by all ranks."""
    from bench.network import SPECS
    from cm import dist_util

    def main() -> None:
        dist_util.setup_dist()
        th.set_num_threads(threads)
        spec = SPECS["cpu"]
        batch = spec.batch // dist_util.get_world_size()
        job = toolkit_job("edm", spec, dist_util.dev(), spec.images(dist_util.dev(), batch), "fp32")
        times = take_turns({"step": job}, dist_util.dev(), repeats)
        if dist_util.is_main():
            print(spec.batch / times["step"].median)

    dist_util.run(main)

