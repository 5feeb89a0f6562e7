"""The drawings of a page: which columns of the logs are drawn, and how."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cm.report.named_runs import Run
from cm.report.run_records import RunRecord
from cm.report.svg import Curve, is_constant, plot

METRICS = ("fid", "frechet_distance")                               # columns of in-training evaluations
COMPARABLE = ("features", "reference", "num_samples")               # of a best: distances of other ones are no match


@dataclass(frozen=True)
class Chart:
    """The style of a column of the log in figures."""

    column: str
    title: str
    unit: str = ""
    log: bool = False
    smooth: bool = False
    stairs: bool = False


CHARTS = (
    Chart("loss", "Loss", log=True, smooth=True),
    Chart("fid", "FID", log=True),
    Chart("frechet_distance", "Fréchet distance", log=True),
    Chart("num_scales", "Noise levels N(k)", stairs=True),
    Chart("target_ema", "Target decay μ(k)", stairs=True),
    Chart("grad_norm", "Gradient norm", log=True, smooth=True),
    Chart("images_per_second", "Throughput", "images/s", smooth=True),
    Chart("lr", "Learning rate"),
    Chart("lg_loss_scale", "fp16 loss scale", "log2"),
    Chart("skipped_steps", "Skipped steps", "in all", stairs=True),
)
NO_CHART = ("step", "samples")


@dataclass(frozen=True)
class Figure:
    """A drawing with its title."""

    title: str
    unit: str
    svg: Markup
    note: str


@dataclass(frozen=True)
class Constant:
    """A column of the log that never changed, with its value in each run."""

    title: str
    values: list[tuple[Run, str]]


@dataclass(frozen=True)
class Curves:
    """The drawings of a page: of the columns in CHARTS, of all others, and what is not worth drawing."""

    figures: list[Figure]
    more: list[Figure]
    constant: list[Constant]


def curves_of(runs: Sequence[Run]) -> Curves:
    """All columns of the logs."""
    known = {chart.column for chart in CHARTS}
    others = sorted({column for run in runs for column in run.record.curves} - known - set(NO_CHART))
    shown, constant = draw(CHARTS, runs)
    # A loss of another name (by quarter of the noise levels, mse) looks like the loss.
    more, still = draw([Chart(name, name, log=True, smooth=True) for name in others], runs)
    return Curves(shown, more, constant + still)


def draw(charts: Iterable[Chart], runs: Sequence[Run]) -> tuple[list[Figure], list[Constant]]:
    """A figure for each chart that has something to show, all with the same steps from left to right; the other ones
    as the value that never changed.
    """
    figures, constant = [], []
    steps = [point.step for run in runs for points in run.record.curves.values() for point in points]
    for chart in charts:
        having = [(run, run.record.curves[chart.column]) for run in runs if run.record.curves.get(chart.column)]
        is_metric = chart.column in METRICS
        if having and not is_metric and all(is_constant(points) for _, points in having):
            values = [(run, f"{points[0].value:.4g}") for run, points in having]
            constant.append(Constant(chart.title, values))
        elif having:
            curves = [
                Curve(run.number, run.name, points, min(points, key=lambda point: point.value) if is_metric else None)
                for run, points in having
            ]
            svg = plot(curves, chart.title, "step", (min(steps), max(steps)), log=chart.log, smooth=chart.smooth,
                       stairs=chart.stairs)
            figures.append(Figure(chart.title, chart.unit, svg, note(runs) if is_metric else ""))
    return figures, constant


def note(runs: Sequence[Run]) -> str:
    """The settings of an evaluation; its features are named in the table of measurements."""
    bests = [best_settings(run.record) for run in runs if run.record.best]
    ways = {json.dumps([best.get(name) for name in COMPARABLE]) for best in bests}
    notes = dict.fromkeys(f"{best.get('num_samples')} samples by {best.get('sampler')}" for best in bests)
    warning = ["measured with different features, references or numbers of samples: not comparable"]
    return "; ".join([*notes, "ring: the best", *(warning if len(ways) > 1 else [])])


def best_settings(run: RunRecord) -> Mapping[str, Any]:
    """The settings with which the best value was measured; empty if best.json does not have them."""
    settings = run.best.get("settings")
    return settings if isinstance(settings, dict) else {}
