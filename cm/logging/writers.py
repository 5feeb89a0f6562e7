"""Where the rows of a log go: a table for people, CSV, JSON lines, TensorBoard.

A row is a name -> number mapping. Files are gone on with if they are there: old rows stay, a row that a crash has torn
goes, and a rewriting is all or nothing.
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
from cm.io import storage, untrusted

Row = Mapping[str, Any]


class Output(Protocol):
    """A place where rows go."""

    def writekvs(self, row: Row, /) -> None: ...

    def drop_after(self, step: int) -> None:
        """Forget the rows whose `step` is larger: a resumed run will write them again."""

    def close(self) -> None: ...


class TableOutput:
    """A table a row, and lines of text, for people; without a file, on the screen."""

    def __init__(self, path: Path | None = None):
        self.path = path
        if path:
            append(path, "")

    def writekvs(self, row: Row, /) -> None:
        cells = [(shorten(name), readable(value)) for name, value in sorted(row.items())]
        if not cells:
            return
        left, right = (max(map(len, column)) for column in zip(*cells))
        rule = "-" * (left + right + 7)
        body = [f"| {name:<{left}} | {value:<{right}} |" for name, value in cells]
        self.writeline("\n".join([rule, *body, rule]))

    def writeline(self, text: str) -> None:
        if self.path:
            append(self.path, text + "\n")
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def drop_after(self, step: int) -> None:
        """What has been read stays said."""

    def close(self) -> None:
        """Nothing is held open between lines."""


class CSVOutput:
    """progress.csv: a header and one row a dump."""

    def __init__(self, path: Path):
        self.path = path
        self.columns: list[str] = []
        rows = self.read()
        if rows is not None:
            self.rewrite(rows)

    def read(self) -> list[dict[str, str]] | None:
        """The rows of the file, without a last one that a crash has torn; None if there is no file."""
        if not self.path.exists():
            return None
        try:
            header, *rows = list(csv.reader(io.StringIO(readable_text(self.path), newline=""))) or [[]]
        except csv.Error as error:
            raise UserError(f"{self.path} is no table of a run ({error}); remove it to go on without it") from None
        self.columns = header
        if rows and len(rows[-1]) < len(header):
            rows.pop()
        return [dict(zip(header, row)) for row in rows]

    def rewrite(self, rows: Iterable[Row]) -> None:
        replace_file(self.path, as_csv(self.columns, rows, header=bool(self.columns)))

    def writekvs(self, row: Row, /) -> None:
        new = sorted(set(row) - set(self.columns))
        if new:
            rows = self.read() or []
            wider = [*self.columns, *new]
            replace_file(self.path, as_csv(wider, [*rows, row], header=True))
            self.columns = wider
        else:
            append(self.path, as_csv(self.columns, [row]))

    def drop_after(self, step: int) -> None:
        rows = self.read()
        if rows is not None:
            self.rewrite(row for row in rows if not is_after(row, step))

    def close(self) -> None:
        """Nothing is held open between rows."""


class JSONOutput:
    """progress.json: an object a line. A number that JSON does not know (nan, inf) is null."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists():
            self.rewrite(self.read())

    def read(self) -> list[str]:
        """The lines of the file, without a last one that a crash has torn."""
        lines = readable_text(self.path).splitlines()
        return lines[:-1] if lines and parsed(lines[-1]) is None else lines

    def rewrite(self, lines: Iterable[str]) -> None:
        replace_file(self.path, "".join(line + "\n" for line in lines))

    def writekvs(self, row: Row, /) -> None:
        append(self.path, as_json(row) + "\n")

    def drop_after(self, step: int) -> None:
        if self.path.exists():
            self.rewrite(line for line in self.read() if not is_after(parsed(line) or {}, step))

    def close(self) -> None:
        """Nothing is held open between rows."""


class StatsOutput(JSONOutput):
    """stats.jsonl, as tools for NVlabs/edm read it: an object a line, {"Loss/loss": {"num", "mean", "std"}, ...,
    "timestamp"}. A value is one report, and `step` a plain number.
    """

    def writekvs(self, row: Row, /) -> None:
        named = {
            f"{'Loss' if name.startswith('loss') or 'mse' in name else 'Progress'}/{name}": {
                "num": 1, "mean": value if math.isfinite(value) else None, "std": 0.0,
            }
            for name, value in row.items() if isinstance(value, (int, float))
        }
        super().writekvs({"step": row.get("step"), **named, "timestamp": time.time()})


class TensorBoardOutput:
    """tb/: a curve for each name, over `step` if the row has one."""

    def __init__(self, path: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"log format 'tensorboard' needs a package: pip install tensorboard ({error})") from None
        self.make_writer, self.path, self.rows = SummaryWriter, path, 0
        self.writer = SummaryWriter(str(path))

    def writekvs(self, row: Row, /) -> None:
        self.rows += 1
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, int(row.get("step", self.rows)))
        self.writer.flush()

    def drop_after(self, step: int) -> None:
        self.writer.close()
        self.writer = self.make_writer(str(self.path), purge_step=step + 1)

    def close(self) -> None:
        self.writer.close()


FORMATS = {
    "stdout": lambda directory, suffix: TableOutput(),
    "log": lambda directory, suffix: TableOutput(directory / f"log{suffix}.txt"),
    "csv": lambda directory, suffix: CSVOutput(directory / f"progress{suffix}.csv"),
    "json": lambda directory, suffix: JSONOutput(directory / f"progress{suffix}.json"),
    "stats": lambda directory, suffix: StatsOutput(directory / f"stats{suffix}.jsonl"),
    "tensorboard": lambda directory, suffix: TensorBoardOutput(directory / f"tb{suffix}"),
}


def readable(value: Any) -> str:
    """A number as people write it: whole ones in full, others with four digits that count."""
    if not isinstance(value, float) or not math.isfinite(value):
        return shorten(str(value))
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def shorten(text: str, limit: int = 30) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def as_csv(columns: Sequence[str], rows: Iterable[Row], header: bool = False) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_json(row: Row) -> str:
    def known(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({key: known(value) for key, value in row.items()}, default=str)


def parsed(line: str) -> dict[str, Any] | None:
    """The row on a line of JSON; None if there is none."""
    try:
        row = untrusted.parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def is_after(row: Row, step: int) -> bool:
    try:
        return float(row["step"]) > step
    except (KeyError, TypeError, ValueError):
        return False


def readable_text(path: Path) -> str:
    """What a file holds, without the zeros that a power cut can leave at its end."""
    with path.open(newline="", errors="replace") as file:
        return file.read().replace("\0", "")


def append(path: Path, text: str) -> None:
    """All of a text or nothing of it, also where the disk is full after half of it."""
    with path.open("ab", buffering=0) as file:
        size, data = file.seek(0, os.SEEK_END), text.encode()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


def replace_file(path: Path, text: str) -> None:
    """The old content or the new one, whatever happens in between.

    :raises UserError: if it cannot be written.
    """
    storage.write_bytes(path, text.encode())
