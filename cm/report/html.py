"""Small parts of a web page about runs: escaped text, names and colours of runs, tables."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MISSING = '<span class="missing">–</span>'


def text(value: Any) -> str:
    """Any value as text of a page."""
    return html.escape(str(value), quote=True)


def writable(content: str) -> str:
    """The text with question marks where UTF-8 has no character, as in file names of another encoding."""
    return content.encode("utf-8", "replace").decode()


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ for all runs."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{each[-1]} ({number})" for number, each in enumerate(parts, start=1)]


def badge(number: int) -> str:
    """A mark in the colour of a run."""
    return f'<i class="badge run-{number % 8}"></i>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    """Cells are text of a page already."""
    columns = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (f'<div class="wide"><table class="{kind}"><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table>'
            "</div>")


def value_cell(value: Any) -> str:
    """`cell`, with six significant digits for a number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.6g}" if is_number else cell(value)


def cell(value: Any) -> str:
    """A value as text of a page, None as a dash."""
    return MISSING if value is None else text(value)
