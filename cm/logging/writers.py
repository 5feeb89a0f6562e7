"""Outputs for the rows of a log: tables to read, CSV, JSON lines, TensorBoard.

A row is a name -> number mapping. Existing files are continued: old rows stay, a row that a crash has cut off is
removed, and a file is rewritten completely or not at all.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cm.errors import UserError
from cm.io import storage, terminal, untrusted

Row = Mapping[str, Any]


class Output(Protocol):
    """What rows can be written to."""

    def writekvs(self, row: Row, /) -> None:
        """Write a row.

        :raises OSError | UserError: if it cannot be written; then nothing of it was.
        """
        ...

    def drop_after(self, step: int) -> None:
        """Remove the rows whose `step` is larger: a resumed run will write them again."""
        ...

    def close(self) -> None:
        """Release what is held open; nothing is written after it."""
        ...


class TableOutput:
    """A table for each row, and lines of text, to read; without a path, on the screen."""

    def __init__(self, path: Path | None = None):
        self.path = path
        if path:
            _append(path, "")

    def writekvs(self, row: Row, /) -> None:
        """Write a row as a table."""
        cells = [(_shorten(name), _readable(value)) for name, value in sorted(row.items())]
        if not cells:
            return
        left, right = (max(map(len, column)) for column in zip(*cells))
        rule = "-" * (left + right + 7)
        body = [f"| {name:<{left}} | {value:<{right}} |" for name, value in cells]
        self.writeline("\n".join([rule, *body, rule]))

    def writeline(self, text: str) -> None:
        """Write a line of text."""
        text = terminal.without_controls(text) + "\n"
        if self.path:
            _append(self.path, text)
        elif sys.stdout is not None:
            try:
                sys.stdout.write(text)
                sys.stdout.flush()
            except OSError as error:
                if error.errno not in terminal.GONE:        # nobody is left to read it
                    raise

    def drop_after(self, step: int) -> None:
        """Nothing: text stays as it was written."""

    def close(self) -> None:
        """Nothing is held open between lines."""


class CSVOutput:
    """progress.csv: a header and one line for each row."""

    def __init__(self, path: Path):
        self.path = path
        self.columns: list[str] = []
        rows = self.read()
        if rows is not None:
            self.rewrite(rows)

    def read(self) -> list[dict[str, str]] | None:
        """The rows of the file, without a last one that a crash has cut off; None if there is no file.

        :raises UserError: if it is no CSV file.
        """
        if not self.path.exists():
            return None
        try:
            header, *rows = list(csv.reader(io.StringIO(_readable_text(self.path), newline=""))) or [[]]
        except csv.Error as error:
            raise UserError(f"{self.path} is no table of a run ({error}); remove it to continue without it") from None
        self.columns = header
        if rows and len(rows[-1]) < len(header):
            rows.pop()
        return [dict(zip(header, row)) for row in rows]

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Replace the file by these rows."""
        replace_file(self.path, _as_csv(self.columns, rows, header=bool(self.columns)))

    def writekvs(self, row: Row, /) -> None:
        """Append a row; new names become columns, for which the file is rewritten."""
        new = sorted(set(row) - set(self.columns))
        if new or not self.path.exists():                   # somebody may have removed it with its header
            rows = self.read() or []
            wider = [*self.columns, *new]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, _as_csv(wider, [*rows, row], header=True))
            self.columns = wider
        else:
            _append(self.path, _as_csv(self.columns, [row]))

    def drop_after(self, step: int) -> None:
        """Remove the rows whose `step` is larger."""
        rows = self.read()
        if rows is not None:
            self.rewrite(row for row in rows if not _is_after(row, step))

    def close(self) -> None:
        """Nothing is held open between rows."""


class JSONOutput:
    """progress.json: an object a line. A number that JSON cannot hold (nan, inf) is null."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists():
            self.rewrite(self.read())

    def read(self) -> list[str]:
        """The lines of the file, without a last one that a crash has cut off."""
        lines = _readable_text(self.path).splitlines()
        return lines[:-1] if lines and _parsed(lines[-1]) is None else lines

    def rewrite(self, lines: Iterable[str]) -> None:
        """Replace the file by these lines."""
        replace_file(self.path, "".join(line + "\n" for line in lines))

    def writekvs(self, row: Row, /) -> None:
        """Append a row."""
        _append(self.path, _as_json(row) + "\n")

    def drop_after(self, step: int) -> None:
        """Remove the rows whose `step` is larger."""
        if self.path.exists():
            self.rewrite(line for line in self.read() if not _is_after(_parsed(line) or {}, step))

    def close(self) -> None:
        """Nothing is held open between rows."""


class StatsOutput(JSONOutput):
    """stats.jsonl, as tools for NVlabs/edm read it: an object a line, {"Loss/loss": {"num", "mean", "std"}, ...,
    "timestamp"}. Every value counts as one report; `step` is a plain number.
    """

    def writekvs(self, row: Row, /) -> None:
        """Append a row."""
        named = {
            f"{'Loss' if name.startswith('loss') or 'mse' in name else 'Progress'}/{name}": {
                "num": 1, "mean": value if math.isfinite(value) else None, "std": 0.0,
            }
            for name, value in row.items() if isinstance(value, (int, float))
        }
        super().writekvs({"step": row.get("step"), **named, "timestamp": time.time()})


class TensorBoardOutput:
    """tb/: a curve for each name, over `step` if the row has one.

    :raises UserError: if the package tensorboard is not installed.
    """

    def __init__(self, path: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"log format 'tensorboard' needs a package: pip install tensorboard ({error})") from None
        self.make_writer, self.path, self.rows = SummaryWriter, path, 0
        self.writer = SummaryWriter(str(path))

    def writekvs(self, row: Row, /) -> None:
        """Add a point to each curve."""
        self.rows += 1
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, int(row.get("step", self.rows)))
        self.writer.flush()

    def drop_after(self, step: int) -> None:
        """Let viewers hide the points whose step is larger."""
        self.writer.close()
        self.writer = self.make_writer(str(self.path), purge_step=step + 1)

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


FORMATS = {
    "stdout": lambda directory, suffix: TableOutput(),
    "log": lambda directory, suffix: TableOutput(directory / f"log{suffix}.txt"),
    "csv": lambda directory, suffix: CSVOutput(directory / f"progress{suffix}.csv"),
    "json": lambda directory, suffix: JSONOutput(directory / f"progress{suffix}.json"),
    "stats": lambda directory, suffix: StatsOutput(directory / f"stats{suffix}.jsonl"),
    "tensorboard": lambda directory, suffix: TensorBoardOutput(directory / f"tb{suffix}"),
}


def _readable(value: Any) -> str:
    """A number to read: integers in full, others with four significant digits."""
    if not isinstance(value, float) or not math.isfinite(value):
        return _shorten(str(value))
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _shorten(text: str, limit: int = 30) -> str:
    """At most `limit` characters of a text, with ... at the end if it is longer."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _as_csv(columns: Sequence[str], rows: Iterable[Row], header: bool = False) -> str:
    """Lines of a CSV file; names that a row lacks are empty cells."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _as_json(row: Row) -> str:
    """A line of JSON, with null for nan and inf."""
    def known(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({key: known(value) for key, value in row.items()}, default=str)


def _parsed(line: str) -> dict[str, Any] | None:
    """The row on a line of JSON; None if there is none."""
    try:
        row = untrusted.parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_after(row: Row, step: int) -> bool:
    """Whether a row has a larger `step`."""
    try:
        return float(row["step"]) > step
    except (KeyError, TypeError, ValueError):
        return False


def _readable_text(path: Path) -> str:
    """The text of a file, without the zeros that a power cut can leave at its end."""
    with path.open(newline="", errors="replace") as file:
        return file.read().replace("\0", "")


def _append(path: Path, text: str) -> None:
    """Append all of a text or, if the disk is full, nothing of it. A folder that was removed is made again.

    :raises OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        size, data = file.seek(0, os.SEEK_END), text.encode(errors="backslashreplace")
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


def replace_file(path: Path, text: str) -> None:
    """Replace a file so that it has its old content or the new one, whatever happens in between.

    :raises UserError: if it cannot be written.
    """
    storage.write_bytes(path, text.encode(errors="backslashreplace"))
