"""One self-contained web page about one or several training runs.

The page asks nothing of the network: style, script, curves and pictures are inside, and its content policy forbids the
rest. Without its script, which shows values under the pointer, everything else works. Here the values of the page are
prepared; assets/page.html.j2 arranges them, and jinja2 escapes all text of the runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cm.report.names import run_names, writable
from cm.report.run_records import RunRecord
from cm.report.svg import Curve, is_constant, plot, short

ASSETS = Path(__file__).parent / "assets"                     # template, style and script of the page
CLASSES_SHOWN = 8                                                   # on a card, with their numbers of images
COLOURS = 8                                                         # of runs, in the style sheet
METRICS = ("fid", "frechet_distance")                               # columns of in-training evaluations
COMPARABLE = ("features", "reference", "num_samples")               # of a best: distances of other ones are no match
NO_DIFFERENCE = ("log_dir",)                                        # flags that differ between any two runs


@dataclass(frozen=True)
class Chart:
    """How a column of the log is drawn."""

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
class Run:
    """A run as the page names it."""

    name: str
    colour: int
    record: RunRecord


def page(records: Sequence[RunRecord], max_grids: int, now: datetime) -> str:
    """The complete page.

    :param max_grids: pictures of samples of each run, at most.
    """
    names = run_names([record.path for record in records])
    runs = [Run(name, number % COLOURS, record) for number, (name, record) in enumerate(zip(names, records))]
    script = asset("page.js")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    several = len(runs) > 1
    return writable(environment.get_template("page.html.j2").render(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'",
        title=f"{'Training runs' if several else 'Training run'}: {', '.join(names)}",
        heading=f"{len(runs)} training runs" if several else "Training run",
        when=f"{now:%Y-%m-%d %H:%M}",
        style=Markup(asset("page.css")),
        script=Markup(script),
        several=several,
        runs=runs,
        cards=[card(run) for run in runs],
        curves=curves_of(runs),
        grids=grids_of(runs, max_grids),
        measured=list(measured_values(runs)),
        settings=settings_of(runs),
        summaries=list(summaries_of(runs)),
    ))


def asset(name: str) -> str:
    """The text of one of the page's own files."""
    return (ASSETS / name).read_text(encoding="utf-8")


# --- at a glance ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A value that one wants to know first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A run at a glance."""

    run: Run
    kind: str
    items: list[Item]
    problems: list[str]


def card(run: Run) -> Card:
    """A run at a glance."""
    config = run.record.config
    kind = [config.get("training_mode"), config.get("data_dir"), side(config)]
    text = " · ".join(str(word) for word in kind if word) or str(run.record.path)
    return Card(run, text, list(summary_items(run.record)), run.record.problems)


def side(config: Mapping[str, Any]) -> str:
    """'64×64', or nothing where the size of the images is not known."""
    size = config.get("image_size")
    return f"{size}×{size}" if size else ""


def summary_items(run: RunRecord) -> Iterator[Item]:
    """What one wants to know first, as far as the log tells."""
    step, samples, loss = run.last("step"), run.last("samples"), run.last("loss")
    if step:
        total = run.config.get("total_training_steps")
        of_total = f"of {short(total)}" if isinstance(total, (int, float)) and total else ""
        yield Item("Steps", short(step.value), of_total)
    if run.classes:
        shown = [f"{name} {short(count)}" for name, count in list(run.classes.items())[:CLASSES_SHOWN]]
        more = len(run.classes) - len(shown)
        yield Item("Classes", short(len(run.classes)), ", ".join([*shown, *([f"and {more} more"] if more else [])]))
    if samples:
        yield Item("Images seen", short(samples.value))
    if loss:
        yield Item("Last loss", f"{loss.value:.4g}")
    metric = next((column for column in METRICS if column in run.curves), None)
    if metric:
        best = min(run.curves[metric], key=lambda point: point.value)
        title = next(chart.title for chart in CHARTS if chart.column == metric)
        yield Item(f"Best {title}", f"{best.value:.4g}", f"at step {short(best.step)}")
    if "images_per_second" in run.curves:
        usual = median(value for _, value in run.curves["images_per_second"])
        yield Item("Throughput", f"{usual:.0f}", "images/s")
        yield Item("Time in steps", duration(seconds_in_steps(run)))


def seconds_in_steps(run: RunRecord) -> float:
    """Images between rows over images per second; saving and evaluating are not in it."""
    speeds, before, seconds = dict(run.curves["images_per_second"]), 0.0, 0.0
    for step, samples in run.curves.get("samples", []):
        if speeds.get(step):
            seconds += (samples - before) / speeds[step]
        before = samples
    return seconds


def duration(seconds: float) -> str:
    """A time in the unit in which it is short."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


# --- curves --------------------------------------------------------------------------------------------------------


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
        having = [(n, run, run.record.curves[chart.column]) for n, run in enumerate(runs)
                  if run.record.curves.get(chart.column)]
        is_metric = chart.column in METRICS
        if having and not is_metric and all(is_constant(points) for _, _, points in having):
            values = [(run, f"{points[0].value:.4g}") for _, run, points in having]
            constant.append(Constant(chart.title, values))
        elif having:
            curves = [
                Curve(n, run.name, points, min(points, key=lambda point: point.value) if is_metric else None)
                for n, run, points in having
            ]
            svg = plot(curves, chart.title, "step", (min(steps), max(steps)), log=chart.log, smooth=chart.smooth,
                       stairs=chart.stairs)
            figures.append(Figure(chart.title, chart.unit, svg, note(runs) if is_metric else ""))
    return figures, constant


def note(runs: Sequence[Run]) -> str:
    """How the values of an evaluation were measured; the features are named in the table of what was measured."""
    bests = [best_settings(run.record) for run in runs if run.record.best]
    ways = {json.dumps([best.get(name) for name in COMPARABLE]) for best in bests}
    notes = dict.fromkeys(f"{best.get('num_samples')} samples by {best.get('sampler')}" for best in bests)
    warning = ["measured with different features, references or numbers of samples: not comparable"]
    return "; ".join([*notes, "ring: the best", *(warning if len(ways) > 1 else [])])


def best_settings(run: RunRecord) -> Mapping[str, Any]:
    """How the best was measured; empty if best.json does not say."""
    settings = run.best.get("settings")
    return settings if isinstance(settings, dict) else {}


# --- pictures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A grid of samples."""

    width: int                                                      # in pixels
    height: int
    text: str
    base64: str


@dataclass(frozen=True)
class Grids:
    """A row for each run, a column for each step; None where a run has no picture of a step."""

    steps: list[str]
    rows: list[tuple[Run, list[Picture | None]]]


def grids_of(runs: Sequence[Run], max_grids: int) -> Grids:
    """Pictures of at most `max_grids` steps, spread over the runs."""
    steps = evenly(sorted({grid.step for run in runs for grid in run.record.grids}), max_grids)
    rows = []
    for run in runs:
        pictures = {
            grid.step: Picture(grid.width, grid.height, f"samples of {run.name} at step {grid.step}",
                               base64.b64encode(grid.png).decode())
            for grid in run.record.grids if grid.step in steps
        }
        rows.append((run, [pictures.get(step) for step in steps]))
    return Grids([short(step) for step in steps], rows)


def evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spaced, the last always."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round((number + 1) * len(steps) / count) - 1] for number in range(count)]


# --- tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A row of what was measured; None where a value is not known."""

    run: Run
    metric: Any
    value: Any
    images: Any
    source: str


def measured_values(runs: Sequence[Run]) -> Iterator[Measured]:
    """The best of each run, and the results of evaluator.py and fid.py that lie in its folder."""
    for run in runs:
        best = run.record.best
        if best:
            count = best_settings(run.record).get("num_samples")
            value = shown_value(best.get("value"))
            yield Measured(run, best.get("metric"), value, count, f"best of training, {best.get('file')}")
        for file, content in run.record.summaries.items():
            for label, value, count in results(content):
                yield Measured(run, label, shown_value(value), count, file)


def shown_value(value: Any) -> Any:
    """Numbers with six digits that count, everything else as it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.6g}" if is_number else value


def results(content: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Label, value and number of images of each result in a file of evaluator.py or fid.py."""
    metrics = content.get("metrics")
    for name, result in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(result, dict) and "value" in result:
            yield result.get("label", name), result["value"], result.get("sample_count")
    if "label" in content and "value" in content:
        yield content["label"], content["value"], content.get("num_images")


FlagRow = tuple[str, list[Any]]
"""A flag with its value in each run, None where a run does not have it."""


@dataclass(frozen=True)
class Settings:
    """All resolved flags, and those that differ, where there is more than one run with flags to compare."""

    comparable: bool
    different: list[FlagRow]
    rows: list[FlagRow]


def settings_of(runs: Sequence[Run]) -> Settings:
    """The flags of all runs."""
    configs = [run.record.config for run in runs]
    known = [config for config in configs if config]

    def differs(flag: str) -> bool:
        values = {json.dumps(config[flag], sort_keys=True) for config in known if flag in config}
        return len(values) > 1 and flag not in NO_DIFFERENCE

    def row(flag: str) -> FlagRow:
        return flag, [str(config[flag]) if flag in config else None for config in configs]

    flags = sorted({flag for config in configs for flag in config})
    return Settings(len(known) > 1, [row(flag) for flag in flags if differs(flag)], [row(flag) for flag in flags])


@dataclass(frozen=True)
class Summary:
    """A JSON file of a run's folder, as it is."""

    run: Run
    file: str
    text: str


def summaries_of(runs: Sequence[Run]) -> Iterator[Summary]:
    """The JSON files that are neither the run's own nor empty."""
    for run in runs:
        for file, content in run.record.summaries.items():
            if content:
                yield Summary(run, file, json.dumps(content, indent=2, ensure_ascii=False))
