"""What a process of the benchmarks runs in a test."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from cm.distributed import setup as dist


def make_note(name: str, with_settings: bool, path: Path) -> Callable[[], object]:
    """A job that appends its name to a file; the process must have the toolkit's settings, or must not."""
    assert (dist._job is not None) == with_settings
    return partial(append, path, name)


def append(path: Path, name: str) -> None:
    with path.open("a") as file:
        file.write(name)
