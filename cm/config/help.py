"""What --help shows: the flags that matter first, and with `--help all` every flag of the command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cm.distributed.launchers import launcher_rank

ALL = "all"
ALWAYS = ("config", "dry_run")                              # of every command that has many flags


class Help(argparse.Action):
    """The flag -h or --help, alone or followed by the word `all`.

    :param first: names of the flags that it shows alone, in this order; empty for every flag.
    """

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, first: Sequence[str] = (),
                 **_: Any):
        text = f"show the flags used most and exit; --help {ALL}: every flag" if first else "show every flag and exit"
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, metavar=ALL, help=text)
        self.first = (*first, *ALWAYS) if first else ()

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values not in (None, ALL):
            parser.error(f"--help {values}: --help stands alone, or before the word {ALL}")
        if values == ALL or not self.first:
            parser.print_help()
        elif launcher_rank() == 0:
            print(short_help(parser, self.first), end="")
        parser.exit()


def short_help(parser: argparse.ArgumentParser, first: Sequence[str]) -> str:
    """Usage, description and these flags, and how to see the others."""
    actions = {action.dest: action for action in parser._actions if action.help != argparse.SUPPRESS}
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, parser._actions, [])
    formatter.add_text(parser.description)
    formatter.start_section("flags used most")
    formatter.add_arguments([actions[name] for name in first])
    formatter.end_section()
    formatter.add_text(f"--help {ALL} shows all {len(actions)} flags.")
    return formatter.format_help()
