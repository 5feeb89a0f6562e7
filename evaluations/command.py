"""The start of the commands of this package: flags first, then the imports that take seconds, then the ranks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from cm.config import early_exit
from cm.config.parser import Parser
from evaluations.defaults import EXTRACTOR_VARIABLE


def start(make_parser: Callable[[], Parser], run: Callable[[argparse.Namespace], None]) -> None:
    """Read the flags, and call `run` with them so that a failure anywhere ends the complete job.

    --help and mistakes in the flags are answered before torch is imported.
    """
    parsed: list[argparse.Namespace] = []
    early_exit.parse_or_exit(lambda: parsed.append(make_parser().parse_args()))
    from cm.distributed import setup as dist  # takes seconds

    def main() -> None:
        dist.setup_dist(device=parsed[0].device)
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


def prepare_output(args: argparse.Namespace, flag: str, *inputs: str) -> None:
    """Find out before the work whether there is a place for its result, the file that a flag such as --json names.

    :param inputs: the flags, or positional arguments, of what the command reads besides its extractor and plugins.
    :raises UserError: if the result would replace an input, or cannot be written.
    """
    path = getattr(args, flag.removeprefix("--"))
    if path:
        from cm.io.outputs import Output, check_outputs
        from cm.io.storage import make_folder

        read = {name: getattr(args, name.removeprefix("--")) for name in inputs}
        check_outputs([Output(flag, path, beside_input=True)], read | _files_of_extractor(args))
        make_folder(os.path.dirname(os.path.abspath(path)))


def _files_of_extractor(args: argparse.Namespace) -> dict[str, str]:
    """The extractor of --inception or of the environment, and the plugins of --plugin."""
    from evaluations.features.preprocessing import sidecar_of

    flag = "--inception" if args.inception else EXTRACTOR_VARIABLE
    spec = args.inception or os.environ.get(EXTRACTOR_VARIABLE) or ""
    path = spec if os.path.isfile(spec) else spec.partition(":")[2]
    files = {flag: path, f"{flag} (its description)": sidecar_of(path)} if path else {}
    return files | {f"--plugin {plugin}": plugin for plugin in args.plugin}
