"""How a command of this package starts: flags first, then the imports that take seconds, then the ranks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping

from cm.config import early_exit
from cm.config.parser import Parser


def start(make_parser: Callable[[], Parser], run: Callable[[argparse.Namespace], None]) -> None:
    """Read the flags, and call `run` with them so that a failure anywhere ends the complete job.

    --help and mistakes in the flags are answered before torch is imported.
    """
    parsed: list[argparse.Namespace] = []
    early_exit.parse_or_exit(lambda: parsed.append(make_parser().parse_args()))
    from cm.distributed import setup as dist  # takes seconds

    def main() -> None:
        dist.setup_dist()
        fetch_inputs(parsed[0])
        run(parsed[0])

    dist.run(main)


def fetch_inputs(args: argparse.Namespace) -> None:
    """Download the files whose addresses the flags give; the flags then name the copies. On every rank.

    :raises UserError: on every rank, if one cannot be had.
    """
    from cm.distributed import setup as dist
    from cm.io import web
    from cm.logging import logger

    for name, value in vars(args).items():
        if isinstance(value, str) and web.is_address(value):
            dist.on_main(web.local_copy, value, logger.log)             # the others find it, or wait
            setattr(args, name, web.local_copy(value, logger.log))


def prepare_json(path: str | None, inputs: Mapping[str, str | None]) -> None:
    """Find out before the work whether there is a place for its result, the file of --json.

    :param inputs: flag -> the file or folder it names.
    :raises UserError: if the result would replace an input, or cannot be written.
    """
    if path:
        from cm.io.outputs import Output, check_outputs
        from cm.io.storage import make_folder

        check_outputs([Output("--json", path, beside_input=True)], inputs)
        make_folder(os.path.dirname(os.path.abspath(path)))
