"""One self-contained web page about one or several training runs.

The page asks nothing of the network: style, script, curves and pictures are inside, and its content policy forbids the
rest. Without its script, which shows values under the pointer, everything else works. All text of the runs is escaped.
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

from cm.report.html import MISSING, badge, cell, run_names, table, text, value_cell, writable
from cm.report.run_records import Grid, RunRecord
from cm.report.svg import Curve, is_constant, plot, short

PARTS = Path(__file__).parent / "assets"                      # style and script of the page
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


def page(runs: Sequence[RunRecord], max_grids: int, now: datetime) -> str:
    """The whole page.

    :param max_grids: pictures of samples of each run, at most.
    """
    names = run_names([run.path for run in runs])
    script = part("page.js")
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{known}'"
    title = f"{'Training run' if len(runs) == 1 else 'Training runs'}: {', '.join(names)}"
    body = "".join([
        f'<header><h1>{"Training run" if len(runs) == 1 else f"{len(runs)} training runs"}</h1>'
        f'<p class="when">{now:%Y-%m-%d %H:%M}</p></header>',
        f'<section class="cards">{"".join(card(n, run, name) for n, (run, name) in enumerate(zip(runs, names)))}'
        "</section>",
        curves_section(runs, names), grids_section(runs, names, max_grids), values_section(runs, names),
        settings_section(runs, names), summaries_section(runs, names),
    ])
    return writable(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{part('page.css')}</style></head>"
        f'<body><main>{body}</main><div id="tip" hidden></div><script>{script}</script></body></html>\n'
    )


def part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


# --- at a glance ---------------------------------------------------------------------------------------------------


def card(number: int, run: RunRecord, name: str) -> str:
    kind = [run.config.get("training_mode"), run.config.get("data_dir"), side(run.config)]
    facts = "".join(f"<div><dt>{text(what)}</dt><dd>{value}</dd></div>" for what, value in summary_items(run))
    problems = "".join(f"<li>{text(gap)}</li>" for gap in run.problems)
    return (
        f'<article class="card run-{number % 8}"><h2>{text(name)}</h2>'
        f'<p class="kind">{text(" · ".join(str(word) for word in kind if word) or run.path)}</p><dl>{facts}</dl>'
        f'{f"<ul class=problems>{problems}</ul>" if problems else ""}</article>'
    )


def side(config: Mapping[str, Any]) -> str:
    size = config.get("image_size")
    return f"{size}×{size}" if size else ""


def summary_items(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Names and values, as text of a page, of what one wants to know first."""
    step, samples, loss = run.last("step"), run.last("samples"), run.last("loss")
    if step:
        total = run.config.get("total_training_steps")
        of = f" <small>of {short(total)}</small>" if isinstance(total, (int, float)) and total else ""
        yield "Steps", f"{short(step.value)}{of}"
    if samples:
        yield "Images seen", short(samples.value)
    if loss:
        yield "Last loss", f"{loss.value:.4g}"
    metric = next((column for column in METRICS if column in run.curves), None)
    if metric:
        best = min(run.curves[metric], key=lambda point: point.value)
        title = next(chart.title for chart in CHARTS if chart.column == metric)
        yield f"Best {title}", f"{best.value:.4g} <small>at step {short(best.step)}</small>"
    if "images_per_second" in run.curves:
        usual = median(value for _, value in run.curves["images_per_second"])
        yield "Throughput", f"{usual:.0f} <small>images/s</small>"
        yield "Time in steps", duration(seconds_in_steps(run))


def seconds_in_steps(run: RunRecord) -> float:
    """Images between rows over images per second; saving and evaluating are not in it."""
    speeds, before, seconds = dict(run.curves["images_per_second"]), 0.0, 0.0
    for step, samples in run.curves.get("samples", []):
        if speeds.get(step):
            seconds += (samples - before) / speeds[step]
        before = samples
    return seconds


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


# --- curves --------------------------------------------------------------------------------------------------------


def curves_section(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    known = {chart.column for chart in CHARTS}
    others = sorted({column for run in runs for column in run.curves} - known - set(NO_CHART))
    shown, constant = figures(CHARTS, runs, names)
    # A loss of another name (by quarter of the noise levels, mse) looks like the loss.
    more, still = figures([Chart(name, name, log=True, smooth=True) for name in others], runs, names)
    facts = "".join(f"<li>{line}</li>" for line in constant + still)
    return (
        f'<section><h2>Curves</h2>{legend(names)}<div class="figures">{"".join(shown)}</div>'
        f'{f"<p>Constant:</p><ul class=constant>{facts}</ul>" if facts else ""}'
        + (f'<details><summary>{len(more)} more columns of the log</summary><div class="figures">{"".join(more)}</div>'
           "</details>" if more else "") + "</section>"
    )


def legend(names: Sequence[str]) -> str:
    if len(names) == 1:
        return ""
    return f'<p class="legend">{"".join(f"<span>{badge(n)}{text(name)}</span>" for n, name in enumerate(names))}</p>'


def figures(charts: Iterable[Chart], runs: Sequence[RunRecord], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """A figure a chart that has something to show; for the others a line with the value that never changed.

    All have the same steps from left to right.
    """
    drawn, constant = [], []
    steps = [point.step for run in runs for points in run.curves.values() for point in points]
    for chart in charts:
        having = [(n, run.curves[chart.column]) for n, run in enumerate(runs) if run.curves.get(chart.column)]
        if not having:
            continue
        if all(is_constant(points) for _, points in having) and chart.column not in METRICS:
            values = " ".join(f"{badge(n) if len(runs) > 1 else ''}{points[0].value:.4g}" for n, points in having)
            constant.append(f"{text(chart.title)} {values}")
            continue
        is_metric = chart.column in METRICS
        curves = [
            Curve(n, names[n], points, min(points, key=lambda point: point.value) if is_metric else None)
            for n, points in having
        ]
        drawn.append(figure(chart, curves, (min(steps), max(steps)), note(chart, runs)))
    return drawn, constant


def figure(chart: Chart, curves: Sequence[Curve], steps: tuple[float, float], remark: str) -> str:
    svg = plot(curves, chart.title, "step", steps, log=chart.log, smooth=chart.smooth, stairs=chart.stairs)
    unit = f" <small>{text(chart.unit)}</small>" if chart.unit else ""
    return (
        f'<figure class="plot"><figcaption>{text(chart.title)}{unit}</figcaption>{svg}'
        f'{f"<p class=note>{text(remark)}</p>" if remark else ""}</figure>'
    )


def note(chart: Chart, runs: Sequence[RunRecord]) -> str:
    """What the values of an evaluation are values of; the features are named in the table of what was measured."""
    if chart.column not in METRICS:
        return ""
    bests = [best_settings(run) for run in runs if run.best]
    ways = {json.dumps([best.get(name) for name in COMPARABLE]) for best in bests}
    notes = dict.fromkeys(f"{best.get('num_samples')} samples by {best.get('sampler')}" for best in bests)
    warning = ["measured with different features, references or numbers of samples: not comparable"]
    return "; ".join([*notes, "ring: the best", *(warning if len(ways) > 1 else [])])


def best_settings(run: RunRecord) -> Mapping[str, Any]:
    """How the best was measured; empty if best.json does not say."""
    settings = run.best.get("settings")
    return settings if isinstance(settings, dict) else {}


# --- pictures ------------------------------------------------------------------------------------------------------


def grids_section(runs: Sequence[RunRecord], names: Sequence[str], max_grids: int) -> str:
    """A row a run, a column a step."""
    steps = evenly(sorted({grid.step for run in runs for grid in run.grids}), max_grids)
    if not steps:
        return ""
    head = "".join(f"<th>step {short(step)}</th>" for step in steps)
    rows = []
    for number, (run, name) in enumerate(zip(runs, names)):
        held = {grid.step: grid for grid in run.grids}
        cells = "".join(f"<td>{picture(held[step], name) if step in held else MISSING}</td>" for step in steps)
        rows.append(f'<tr><th scope="row">{badge(number) if len(runs) > 1 else ""}{text(name)}</th>{cells}</tr>')
    return (
        f'<section><h2>Samples</h2><p class="hint">The same noise in each picture. A click enlarges one.</p>'
        f'<div class="wide"><table class="grids"><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def picture(grid: Grid, name: str) -> str:
    source = base64.b64encode(grid.png).decode()
    return (
        f'<label><input type="checkbox"><img loading="lazy" width="{grid.width}" height="{grid.height}" '
        f'alt="{text(f"samples of {name} at step {grid.step}")}" src="data:image/png;base64,{source}"></label>'
    )


def evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spaced, the last always."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round((number + 1) * len(steps) / count) - 1] for number in range(count)]


# --- tables --------------------------------------------------------------------------------------------------------


def settings_section(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """All resolved flags; those that differ first, and marked."""
    flags = sorted({name for run in runs for name in run.config})
    if not flags:
        return ""
    known = [run.config for run in runs if run.config]

    def differs(flag: str) -> bool:
        values = {json.dumps(config[flag], sort_keys=True) for config in known if flag in config}
        return len(values) > 1 and flag not in NO_DIFFERENCE

    def row(flag: str) -> list[str]:
        values = [setting(run.config[flag]) if flag in run.config else MISSING for run in runs]
        return [f"<code>{text(flag)}</code>", *values]

    head = ["flag", *(f"{badge(n) if len(runs) > 1 else ''}{text(name)}" for n, name in enumerate(names))]
    different = [flag for flag in flags if differs(flag)]
    parts = ["<section><h2>Configuration</h2>"]
    if len(known) > 1:
        parts.append(table(head, map(row, different), "settings different") if different
                     else "<p>The runs have the same flags.</p>")
    parts.append(f"<details{'' if different or len(known) > 1 else ' open'}><summary>All {len(flags)} flags</summary>")
    parts.append(table(head, map(row, flags), "settings"))
    return "".join([*parts, "</details></section>"])


def setting(value: Any) -> str:
    return '<span class="missing">empty</span>' if value == "" else text(value)


def values_section(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """What was measured: the best of each run, and the results of evaluator.py and fid.py that lie in its folder."""
    rows = []
    for number, (run, name) in enumerate(zip(runs, names)):
        first = f"{badge(number) if len(runs) > 1 else ''}{text(name)}"
        if run.best:
            count = best_settings(run).get("num_samples")
            value, place = value_cell(run.best.get("value")), f"best of training, {run.best.get('file')}"
            rows.append([first, text(run.best.get("metric")), value, cell(count), text(place)])
        for file, content in run.summaries.items():
            rows += [[first, text(label), value_cell(value), cell(count), text(file)]
                     for label, value, count in measured(content)]
    if not rows:
        return ""
    head = ["run", "metric", "value", "images", "from"]
    return f'<section><h2>Measured</h2>{table(head, rows, "measured")}</section>'


def measured(content: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Label, value and number of images of each result in a file of evaluator.py or fid.py."""
    metrics = content.get("metrics")
    for name, result in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(result, dict) and "value" in result:
            yield result.get("label", name), result["value"], result.get("sample_count")
    if "label" in content and "value" in content:
        yield content["label"], content["value"], content.get("num_images")


def summaries_section(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Other JSON files of the folders, as they are."""
    parts = [
        f"<details><summary>{badge(number) if len(runs) > 1 else ''}{text(name)}/{text(file)}</summary>"
        f"<pre>{text(json.dumps(content, indent=2, ensure_ascii=False))}</pre></details>"
        for number, (run, name) in enumerate(zip(runs, names)) for file, content in run.summaries.items() if content
    ]
    return f'<section><h2>Summaries</h2>{"".join(parts)}</section>' if parts else ""
