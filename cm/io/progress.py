"""Progress on stderr: a bar on a terminal, and a line a minute anywhere else, such as in the log of a batch job."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0
"""Seconds between two lines if the output is not a terminal."""


class LineProgress(tqdm):
    """A tqdm whose display is a complete line, at most one in `LINE_SECONDS`, and one at the end if it is to stay.

    A carriage return or a cursor movement would be part of a log file for ever.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.shown_at = time.monotonic()
        # A fixed `miniters` keeps the library's own monitor from asking for more.
        super().__init__(*args, **kwargs, mininterval=1.0, miniters=1, dynamic_ncols=False, bar_format=(
            "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} in {elapsed}, {remaining} left, {rate_fmt}{postfix}"
        ))

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line if it is time for one."""
        if time.monotonic() - self.shown_at >= LINE_SECONDS:
            self._write_line()
        return True

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """A line that has been written stays."""

    def moveto(self, n: int) -> None:
        """Lines follow each other."""

    def close(self) -> None:
        """Write the last line if all is done, unless the progress is to leave nothing."""
        if self.disable:
            return
        if self.leave and (self.total is None or self.n >= self.total):    # not of work that an error has ended
            self._write_line()
        self.disable = True
        # As the library's own `close` does, which writes a carriage return besides.
        self._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue] (not in its stubs)

    def _write_line(self) -> None:
        self.shown_at = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()


def progress(
    items: Iterable[Any] | None = None, title: str = "", *, total: float | None = None, unit: str = "it",
    initial: int = 0, shown: bool = True, leave: bool = True, unit_scale: bool = False,
) -> Any:
    """A tqdm on stderr: over `items`, or to be moved by `update`.

    :param total: how many there are; None for `len(items)`.
    :param initial: how many were done before.
    :param shown: whether it shows anything; on one rank of a job.
    :param leave: whether its last state stays to be read.
    """
    kind = tqdm if on_terminal() else LineProgress
    on_screen: dict[str, Any] = {"dynamic_ncols": True} if kind is tqdm else {}
    return kind(
        items, desc=title or None, total=total, unit=unit, initial=initial, disable=not shown, leave=leave,
        unit_scale=unit_scale, file=sys.stderr, **on_screen,
    )


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError, OSError):           # closed, or replaced by something without the method
        return False


def say(text: str) -> None:
    """A line on stderr, above a bar that is shown there."""
    tqdm.write(text, file=sys.stderr)
