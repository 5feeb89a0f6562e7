"""Log formats json (progress.json) and stats (stats.jsonl): one object per line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cm.io import budget
from cm.logging.files import append, is_after, readable_text, replace_file
from cm.logging.writers import Row, Writer


class JSONWriter(Writer):
    """Rows as they are. A number that JSON cannot hold (nan, inf) is null."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists():
            self.rewrite(self.read())

    @classmethod
    def open(cls, directory: Path, suffix: str) -> Writer:
        return cls(directory / f"progress{suffix}.json")

    def read(self) -> list[str]:
        """The lines of the file, without a last one that a crash has cut off."""
        lines = readable_text(self.path).splitlines()
        return lines[:-1] if lines and _parsed(lines[-1]) is None else lines

    def rewrite(self, lines: Iterable[str]) -> None:
        """Replace the file by these lines."""
        replace_file(self.path, "".join(line + "\n" for line in lines))

    def scalars(self, step: int | None, row: Row) -> None:
        """Append a row."""
        append(self.path, _as_json(row) + "\n")

    def drop_after(self, step: int) -> None:
        """Remove the rows whose `step` is larger."""
        if self.path.exists():
            self.rewrite(line for line in self.read() if not is_after(_parsed(line) or {}, step))


class StatsWriter(JSONWriter):
    """As tools for NVlabs/edm read it: {"Loss/loss": {"num", "mean", "std"}, ..., "timestamp"}.

    Every value counts as one report, and what is empty as none; `step` is a plain number.
    """

    @classmethod
    def open(cls, directory: Path, suffix: str) -> Writer:
        return cls(directory / f"stats{suffix}.jsonl")

    def scalars(self, step: int | None, row: Row) -> None:
        """Append a row."""
        named = {
            f"{'Loss' if name.startswith('loss') or 'mse' in name else 'Progress'}/{name}": {
                "num": int(value is not None), "mean": value, "std": 0.0,
            }
            for name, value in row.items() if value is None or isinstance(value, (int, float))
        }
        super().scalars(step, {"step": step, **named, "timestamp": time.time()})


def _as_json(row: Row) -> str:
    """A line of JSON, with null for nan and inf."""
    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: known(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(dict(row)), default=str)


def _parsed(line: str) -> dict[str, Any] | None:
    """The row on a line of JSON; None if there is none."""
    try:
        row = budget.parse_json(line, budget.LOG)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
