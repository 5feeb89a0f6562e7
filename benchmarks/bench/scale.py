"""How the time and the memory of a training step grow, one thing at a time, beside the law that they should follow.

A law is a sum of terms, such as a constant and the number of images, whose sizes are fitted to the measured points;
what is asked is whether the points follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch as th
from tqdm.auto import tqdm

from bench import objectives, ranks
from bench.children import peak_in_child
from bench.lines import Line
from bench.network import NetworkSpec, forward_flops
from bench.timing import take_turns
from bench.train import toolkit_job
from cm.io.storage import write_bytes
from cm.report.plots import line_plot

SMALL = NetworkSpec(16, 32, "1,2", 1, 32, "8", 16)           # so that the largest point of an axis stays short
WIDE = 0.10                                                 # a deviation from the law that the line names
Job = Callable[[], None]
Law = Callable[[int], Sequence[float]]                      # value -> terms


@dataclass(frozen=True)
class Axis:
    """One thing that grows."""

    values: tuple[int, ...]
    job: Callable[[th.device, int], Job]                    # what is timed
    time: Law
    time_text: str
    memory: Law
    memory_text: str


def step(spec: NetworkSpec, device: th.device, **options: object) -> Job:
    return toolkit_job("edm", spec, device, spec.images(device), "fp32", **options)


def sized(side: int) -> NetworkSpec:
    return replace(SMALL, image_size=side, attention_resolutions=str(side // 2))


@cache
def flops(side: int) -> float:
    spec = sized(side)
    return forward_flops(spec.build(th.device("cpu")), spec.images(th.device("cpu"), 1))


def consistency(device: th.device, scales: int) -> Job:
    return toolkit_job("consistency_training", SMALL, device, SMALL.images(device), "fp32", scales=scales)


def target_field(device: th.device, num_references: int) -> Job:
    return objectives.job("stf", {"num_references": num_references}, "edm", SMALL, device, SMALL.images(device))


def constant(value: int) -> tuple[float]:
    return (1.0,)


def with_a_part_for_each(value: int) -> tuple[float, float]:
    return 1.0, float(value)


FIXED, EACH = "constant", "a constant and a part for each"
AXES = {
    "batch": Axis((8, 16, 32, 64), lambda device, n: step(replace(SMALL, batch=n), device),
                  with_a_part_for_each, EACH, with_a_part_for_each, EACH),
    "image side": Axis((8, 16, 32, 64), lambda device, side: step(sized(side), device),
                       lambda side: (1.0, flops(side)), "a constant and the FLOPs",
                       lambda side: (1.0, float(side**2)), "a constant and the pixels"),
    "weight averages": Axis((1, 2, 4, 8), lambda device, n: step(SMALL, device, ema_rates=(0.999,) * n),
                            with_a_part_for_each, EACH, with_a_part_for_each, EACH),
    "N of consistency training": Axis((11, 41, 161, 641), consistency, constant, FIXED, constant, FIXED),
    "STF's references": Axis((256, 1024, 4096, 16384), target_field,
                             with_a_part_for_each, EACH, with_a_part_for_each, EACH),
}


def scale_suite(device: th.device, repeats: int, out: Path | None) -> list[Line]:
    """A line for each point, with time and memory, and pictures for each axis in `out`; then those of the ranks."""
    lines = []
    for name, axis in tqdm(AXES.items(), "axes"):
        times = take_turns({str(n): axis.job(device, n) for n in axis.values}, device, repeats)
        seconds = {n: times[str(n)].median for n in axis.values}
        peaks = {n: peak_in_child("bench.scale", "point", name, n, device=device) for n in axis.values}
        time_law, peak_law = fit(seconds, axis.time), fit(peaks, axis.memory)
        for n in axis.values:
            note = (f"time {deviation(seconds[n], time_law[n])} ({axis.time_text}), "
                    f"memory {deviation(peaks[n], peak_law[n])} ({axis.memory_text})")
            lines.append(Line("scale", f"{name} {n}", seconds[n], peak_mib=peaks[n], note=note))
        if out is not None:
            out.mkdir(exist_ok=True)
            draw(name, "seconds per step", seconds, time_law, axis.time_text, out)
            draw(name, "peak MiB", peaks, peak_law, axis.memory_text, out)
    return lines + ranks.rank_lines(device, repeats)


def point(device: th.device, name: str, value: int) -> Job:
    """What is measured at a point of an axis."""
    return AXES[name].job(device, value)


def fit(measured: Mapping[int, float], law: Law) -> dict[int, float]:
    """The law's values, its terms being sized so that the relative deviations are least in their squares."""
    terms = np.array([law(value) for value in measured])
    numbers = np.array(list(measured.values()))
    sizes = np.linalg.lstsq(terms / numbers[:, None], np.ones(len(numbers)), rcond=None)[0]
    return dict(zip(measured, (terms @ sizes).tolist()))


def deviation(measured: float, law: float) -> str:
    off = measured / law - 1
    return f"{off:+.0%}" + (", outside 10 %," if abs(off) > WIDE else "") + " of its law"


def draw(
    axis: str, what: str, measured: Mapping[int, float], law: Mapping[int, float], text: str, out: Path
) -> None:
    curves = {"measured": list(measured.items()), f"law: {text}": list(law.items())}
    name = f"{axis}_{what.split()[0]}".replace(" ", "_").replace("'", "").lower()
    write_bytes(out / f"{name}.png", line_plot(curves, axis, what, log=True))   # the values grow by factors
