"""--plugin: Python files of the user's that add to the tables of this toolkit, see docs/extending.md.

Only files that the command line names are run. The name of a plugin is part of no config file, manifest or checkpoint,
so that none of these, which may come from anybody, can have code executed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence

from cm.errors import UserError

NAME = "plugin"
FLAG = f"--{NAME}"

_loaded: dict[str, str] = {}                                # real path -> name of its module


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Give a command the flag; `cm.config.flags.Parser` loads the files."""
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE",
                        help="Python file to run first, which registers your own objectives, samplers, metrics and so "
                        "on; may be repeated")


def named(words: Sequence[str]) -> list[str]:
    """The files that --plugin FILE and --plugin=FILE name."""
    after = [following for word, following in zip(words, words[1:]) if word == FLAG]
    return after + [word.partition("=")[2] for word in words if word.startswith(f"{FLAG}=")]


def load_named(words: Sequence[str]) -> None:
    """Run the files that the words of a command line name.

    :raises UserError: as `load`.
    """
    for path in named(words):
        load(os.path.expanduser(path))


def load(path: str) -> None:
    """Run a file, unless it was run in this process already.

    :raises UserError: if it is missing or fails; the message names its line.
    """
    real = os.path.realpath(path)
    if real in _loaded:
        return
    if not os.path.isfile(real):
        raise UserError(f"{FLAG} {path}: no such file")
    name = f"cm_plugin_{len(_loaded)}_{os.path.splitext(os.path.basename(real))[0]}"
    spec = importlib.util.spec_from_file_location(name, real)
    if spec is None or spec.loader is None:
        raise UserError(f"{FLAG} {path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module                              # where pickles and dataclasses look for its classes
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == real]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise UserError(f"{FLAG} {path}, line {line}: {type(error).__name__}: {error}") from error
    _loaded[real] = name
