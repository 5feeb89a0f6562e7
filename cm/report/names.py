"""Names of runs and files as text that can be shown."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def writable(words: str) -> str:
    """The same with question marks for control characters and where UTF-8 has no character, as in file names of
    another encoding. Tabs and ends of lines stay.
    """
    return CONTROL.sub("?", words.encode("utf-8", "replace").decode())


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish the runs."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{each[-1]} ({number})" for number, each in enumerate(parts, start=1)]
