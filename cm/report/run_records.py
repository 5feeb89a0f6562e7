"""The files in a run's folder, read back: the log, the flags, pictures of samples, the best checkpoint, summaries.

Files are only read. Whatever cannot be read is left out and named in `problems`, so the report of a run that crashed or
is still running says what is missing.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cm.errors import UserError
from cm.io import budget

OWN_FILES = re.compile(r"(config|sampling_config|best|classes|status|checkpoint_\d+|progress.*|.*_state)\.json")
STEP = "step"
LARGEST_STEP = 1e15                                                 # up to it, floats can count
LARGEST, SMALLEST = 1e100, 1e-100                                   # values that can be drawn, but for 0
MUST_BE_FINITE = ("loss", "grad_norm")                              # columns where nan or inf is a problem


class Point(NamedTuple):
    """A point of a curve."""

    step: float
    value: float


class Grid(NamedTuple):
    """A picture of samples."""

    step: int
    png: bytes
    width: int                                                      # in pixels
    height: int


@dataclass
class RunRecord:
    """One run."""

    path: Path
    curves: dict[str, list[Point]]                                  # by column of the log; steps rise
    config: dict[str, Any] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)                 # steps rise
    best: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)           # images of each
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)      # by file name
    problems: list[str] = field(default_factory=list)

    def last(self, column: str) -> Point | None:
        """The last point of a column; None if the log has none."""
        points = self.curves.get(column)
        return points[-1] if points else None


def read_run(directory: str) -> RunRecord:
    """Everything in a run's folder.

    :raises UserError: if there is no such folder, or no log with a row in it.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"{directory} is not a folder; give the --log_dir of a training run")
    problems: list[str] = []
    run = RunRecord(path, _curves_of(_read_log(path, problems), problems), problems=problems)
    run.config = _read_json(path / "config.json", problems, "the flags are not known")
    if (path / "best.json").exists():
        run.best = _read_json(path / "best.json", problems, "the best checkpoint is not known")
    if (path / "classes.json").exists():
        run.classes = _classes_of(_read_json(path / "classes.json", problems, "the classes are not known"), problems)
    run.grids = _read_grids(path / "samples", problems)
    for file in sorted(path.glob("*.json")):
        if not OWN_FILES.fullmatch(file.name) and file.is_file() and file.stat().st_size <= budget.SETTINGS.bytes:
            run.summaries[file.name] = _read_json(file, problems, "its content is not shown")
    return run


# --- the log -------------------------------------------------------------------------------------------------------


def _read_log(path: Path, problems: list[str]) -> Sequence[Mapping[str, Any]]:
    """The rows of progress.csv, or of progress.json where there is no CSV.

    :raises UserError: if there is neither, or no row in it.
    """
    for name, read in (("progress.csv", _csv_rows), ("progress.json", _json_rows)):
        if (path / name).exists():
            try:
                text = budget.read_text(path / name, budget.LOG)
            except UserError:
                raise
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {path / name}: {getattr(error, 'strerror', None) or error}") from None
            rows: list[Mapping[str, Any]] = list(read(text, name, problems))
            if not rows:
                raise UserError(f"{path / name} has no row yet: the run has not logged a step")
            return rows
    raise UserError(
        f"{path} has no log (progress.csv or progress.json): give the --log_dir of a training run that wrote one "
        "(OPENAI_LOG_FORMAT must name csv or json)"
    )


def _csv_rows(text: str, name: str, problems: list[str]) -> Iterator[dict[str, str]]:
    """The rows; one with too few or too many cells is skipped and named in `problems`."""
    reader = csv.reader(io.StringIO(text.replace("\0", "\ufffd"), newline=""))
    header, bad = next(reader, []), []
    while True:
        try:
            row = next(reader, None)
        except csv.Error:
            row = []
        if row is None:
            break
        if len(row) == len(header):
            yield dict(zip(header, row))
        else:
            bad.append(reader.line_num)
    if bad:
        problems.append(f"{name}: {_listed('line', bad)} incomplete or damaged, left out")


def _json_rows(text: str, name: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The objects on the lines; a line without one is skipped and named in `problems`."""
    bad = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = budget.parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield row
        else:
            bad.append(number)
    if bad:
        problems.append(f"{name}: {_listed('line', bad)} incomplete or damaged, left out")


@dataclass
class _Columns:
    """The cells of a log, sorted into values and problems, by column."""

    values: dict[str, dict[float, float]] = field(default_factory=dict)     # {step: value}
    not_numbers: Counter[str] = field(default_factory=Counter)              # cells that are not numbers, by column
    too_large: Counter[str] = field(default_factory=Counter)                # how many cells no axis can hold
    not_finite: dict[str, list[float]] = field(default_factory=dict)        # steps

    def add(self, column: str, step: float, cell: Any) -> None:
        """Sort one cell; an empty cell is none, and a value replaces an earlier one of the same step."""
        value = _as_number(cell)
        if value is None:
            self.not_numbers[column] += cell not in ("", None)
        elif math.isfinite(value) and abs(value) > LARGEST:
            self.too_large[column] += 1
        elif math.isfinite(value):
            self.values.setdefault(column, {})[step] = value if abs(value) >= SMALLEST else 0.0
        elif column in MUST_BE_FINITE:
            self.not_finite.setdefault(column, []).append(step)

    def problems(self) -> list[str]:
        """The problems of the cells, a sentence for each column."""
        counts = [(column, count) for column, count in self.not_numbers.items() if count]
        return [
            *(f"column {column!r}: {count} cell(s) are no number" for column, count in counts),
            *(f"column {column!r}: {count} cell(s) beyond {LARGEST:g}, left out" for column, count in
              self.too_large.items()),
            *(f"{column} is not finite at {_listed('step', steps)}" for column, steps in self.not_finite.items()),
        ]


def _curves_of(rows: Sequence[Mapping[str, Any]], problems: list[str]) -> dict[str, list[Point]]:
    """The points of each column. The last row of a step counts; empty cells and nan are no points."""
    if not any(STEP in row for row in rows):
        problems.append("the log has no column 'step': rows are numbered instead")
        rows = [{**row, STEP: number} for number, row in enumerate(rows, start=1)]
    columns = _Columns()
    for row in rows:
        step = _as_number(row.get(STEP))
        if step is None or not abs(step) <= LARGEST_STEP:
            columns.not_numbers[STEP] += 1
            continue
        for column, cell in row.items():
            columns.add(column, step, cell)
    problems += columns.problems()
    return {name: [Point(*point) for point in sorted(points.items())] for name, points in columns.values.items()}


def _as_number(cell: Any) -> float | None:
    """A cell as a number; None if it is none."""
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def _listed(what: str, numbers: Iterable[float], shown: int = 5) -> str:
    """'steps 1, 2, 3, 4, 5 and 7 more'."""
    numbers = list(numbers)
    first = ", ".join(f"{number:.0f}" for number in numbers[:shown])
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {first}{more}"


# --- the other files -----------------------------------------------------------------------------------------------


def _read_json(path: Path, problems: list[str], consequence: str) -> dict[str, Any]:
    """The object in a JSON file; if there is none, an empty one, and a problem that names the `consequence`."""
    try:
        content = budget.read_json(path, budget.SETTINGS)
    except FileNotFoundError:
        problems.append(f"no {path.name}: {consequence}")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({type(error).__name__}): {consequence}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds a {type(content).__name__}, not an object: {consequence}")
        return {}
    return content


def _classes_of(content: Mapping[str, Any], problems: list[str]) -> dict[str, int]:
    """The classes with their numbers of images; none if the object holds something else."""
    classes = content.get("classes", {})
    counts = classes.values() if isinstance(classes, dict) else [None]
    if all(type(count) is int and 0 <= count < LARGEST_STEP for count in counts):
        return classes
    problems.append("classes.json holds no numbers of images: the classes are not known")
    return {}


def _read_grids(folder: Path, problems: list[str]) -> list[Grid]:
    """The pictures, by the step that ends their names: samples_000100.png."""
    grids, meter = {}, budget.Meter(budget.GRIDS)
    for path in sorted(folder.glob("*.png")):
        number = re.search(r"(\d+)$", path.stem)
        if not number:
            problems.append(f"samples/{path.name} names no step, left out")
            continue
        try:
            png = budget.read_bytes(path, budget.GRIDS)
            meter.spend(size=len(png))
            with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
                size = image.size
                image.verify()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problems.append(f"samples/{path.name} is not a complete PNG ({type(error).__name__}), left out")
            continue
        grids[int(number[1])] = Grid(int(number[1]), png, *size)
    if not grids:
        problems.append("no pictures of samples: training with --sample_interval -1 leaves one at each save")
    return [grids[step] for step in sorted(grids)]
