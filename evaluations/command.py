"""How a command of this package starts: flags first, then the imports that take seconds, then the ranks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from cm.config import early_exit
from cm.config.flags import Parser


def start(make_parser: Callable[[], Parser], run: Callable[[argparse.Namespace], None]) -> None:
    """Read the flags, and call `run` with them so that a failure anywhere ends the complete job.

    --help and mistakes in the flags are answered before torch is imported.
    """
    parsed: list[argparse.Namespace] = []
    early_exit.parse_or_exit(lambda: parsed.append(make_parser().parse_args()))
    from cm.distributed import setup as dist  # takes seconds

    dist.run(lambda: run(parsed[0]))


def make_folder_of(path: str | None) -> None:
    """Find out before the work whether there is a place for its result.

    :raises UserError: if its folder cannot be made.
    """
    if path:
        from cm.io.storage import make_folder

        make_folder(os.path.dirname(os.path.abspath(path)))
