"""The tables of a page: pictures of samples, measurements, flags, and summaries."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cm.report.figures import best_settings
from cm.report.named_runs import Run
from cm.report.svg import short

NO_DIFFERENCE = ("log_dir",)                                        # flags that differ between any two runs
COLUMNS = 2                                                         # runs at most that have a column each

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
    """The pictures of each run by step, the newest first; None where a run has no picture of a step."""

    steps: list[str]
    rows: list[tuple[Run, list[Picture | None]]]


def grids_of(runs: Sequence[Run], max_grids: int) -> Grids:
    """Pictures of at most `max_grids` steps, spread over the runs."""
    steps = evenly(sorted({grid.step for run in runs for grid in run.record.grids}), max_grids)[::-1]
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
    """The best value of each run, and the results of evaluator.py and fid.py in its folder."""
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
    """All resolved flags, and those that differ, where there is more than one run with flags to compare.

    :param columns: whether each run has a column; otherwise each value has the list of its runs.
    """

    comparable: bool
    columns: bool
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
    different = [row(flag) for flag in flags if differs(flag)]
    return Settings(len(known) > 1, len(runs) <= COLUMNS, different, [row(flag) for flag in flags])


def by_value(row: FlagRow, runs: Sequence[Run]) -> list[tuple[Any, list[Run]]]:
    """The values of a flag in the order of the runs, each with the runs that have it."""
    found: dict[Any, list[Run]] = {}
    for value, run in zip(row[1], runs):
        found.setdefault(value, []).append(run)
    return list(found.items())


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
