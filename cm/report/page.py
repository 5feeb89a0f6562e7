"""One self-contained web page about one or several training runs.

The page needs no network access: style, script, curves and pictures are inside, and its content policy forbids the
rest. Its script shows values under the pointer, filters the runs and puts two of them side by side; everything else
works without it. Here the values of the page are prepared; assets/page.html.j2 arranges them, and jinja2 escapes all
text of the runs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cm.report.figures import CHARTS, METRICS, curves_of
from cm.report.named_runs import Run, named_runs
from cm.report.names import writable
from cm.report.run_records import RunRecord
from cm.report.svg import as_script, short
from cm.report.tables import by_value, grids_of, measured_values, settings_of, summaries_of

ASSETS = Path(__file__).parent / "assets"                     # template, style and script of the page
CLASSES_SHOWN = 8                                                   # on a card, with their numbers of images
NAMES_IN_TITLE = 4


def page(records: Sequence[RunRecord], max_grids: int, now: datetime, passed_over: Sequence[str] = ()) -> str:
    """The complete page.

    :param max_grids: pictures of samples of each run, at most.
    :param passed_over: the paths that are not runs, with the reasons.
    """
    runs = named_runs(records)
    more = len(runs) - NAMES_IN_TITLE
    names = [run.name for run in runs[:NAMES_IN_TITLE]] + ([f"{more} more"] if more > 0 else [])
    cards = [card(run) for run in runs]
    script = asset("page.js")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    environment.globals["by_value"] = by_value
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
        cards=cards,
        passed_over=list(passed_over),
        data=Markup(as_script([run_data(each) for each in cards])),
        curves=curves_of(runs),
        grids=grids_of(runs, max_grids),
        measured=list(measured_values(runs)),
        settings=settings_of(runs),
        summaries=list(summaries_of(runs)),
    ))


def run_data(card: Card) -> dict[str, Any]:
    """The data of a run for the script of the page: the words for the filter, and the flags to compare."""
    run = card.run
    flags = {flag: str(value) for flag, value in run.record.config.items()}
    return {"name": run.name, "words": f"{run.name} {card.kind}".lower(), "flags": flags}


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
    """The most important facts of a run, if the log has them."""
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
