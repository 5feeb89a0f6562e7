"""Log formats stdout and log: a readable table for each row, and lines of text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cm.io import terminal
from cm.logging.files import append
from cm.logging.writers import Row, Writer


class ScreenWriter(Writer):
    """Standard output, as it is when a line is written: a program may redirect it."""

    rows_wait = False                                       # old tables are useless

    @classmethod
    def open(cls, directory: Path, suffix: str) -> Writer:
        return cls()

    def scalars(self, step: int | None, row: Row) -> None:
        """Write a row as a table."""
        cells = [(_shorten(name), _readable(value)) for name, value in row.items() if value is not None]
        if not cells:
            return
        left, right = (max(map(len, column)) for column in zip(*cells))
        rule = "-" * (left + right + 7)
        body = [f"| {name:<{left}} | {value:<{right}} |" for name, value in cells]
        self.text("\n".join([rule, *body, rule]))

    def text(self, line: str) -> None:
        """Write a line of text, in which control characters are escapes."""
        self.write(terminal.without_controls(line) + "\n")

    def write(self, text: str) -> None:
        """Write to where the tables go."""
        if (stream := terminal.text_stream()) is not None:
            try:
                stream.write(text)
                stream.flush()
            except OSError as error:
                if error.errno not in terminal.GONE:        # nobody is left to read it
                    raise


class TableWriter(ScreenWriter):
    """log.txt."""

    def __init__(self, path: Path):
        self.path = path
        append(path, "")

    @classmethod
    def open(cls, directory: Path, suffix: str) -> Writer:
        return cls(directory / f"log{suffix}.txt")

    def write(self, text: str) -> None:
        append(self.path, text)


def _readable(value: Any) -> str:
    """A number to read: integers in full, others with four significant digits."""
    if not isinstance(value, float) or not math.isfinite(value):
        return _shorten(str(value))
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _shorten(text: str, limit: int = 30) -> str:
    """At most `limit` characters of a text, with ... at the end if it is longer."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
