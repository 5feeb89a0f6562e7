"""The command-line parser of every command: one message for all ranks, and the flag that was meant."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from cm.config import plugins
from cm.distributed.launchers import DEVICES, launcher_rank
from cm.io import terminal

FOREIGN_FLAGS = {
    "--network": "--model_path", "--batch": "--global_batch_size", "--batch-gpu": "--microbatch",
    "--duration": "--total_kimg (EDM's --duration counts thousands of them)", "--cbase": "--num_channels",
    "--cres": "--channel_mult", "--cond": "--class_cond", "--xflip": "--random_flip", "--class": "--class_label",
    "--stf": "--objective stf", "--transfer": "--resume_checkpoint", "--ls": "--fp16_scale_growth",
    "--fp16": "--use_fp16", "--ema": "--ema_halflife_kimg", "--data": "--data_dir", "--workers": "--num_workers",
    "--batch-size": "--batch_size", "--num-steps": "--steps", "--num_steps": "--steps",
    "--learning_rate": "--lr", "--learning-rate": "--lr", "--resolution": "--image_size", "--output_dir": "--log_dir",
    "--train_data_dir": "--data_dir", "--train_batch_size": "--batch_size", "--mixed_precision": "--precision",
    "--max_train_steps": "--total_training_steps", "--resume_from_checkpoint": "--resume",
    "--guidance_scale": "--guide_scale", "--cfg_scale": "--guide_scale", "--n_samples": "--num_samples",
}
"""Flag of another tool -> the flag of this toolkit, to suggest it where the first does not exist."""


class Parser(argparse.ArgumentParser):
    """Reports each mistake once for all ranks, and suggests the flag that was meant.

    A path may begin with ~, also where no shell expands it. A flag given twice is a mistake, and a negative number may
    have an exponent.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|^-inf$|^-nan$", re.IGNORECASE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [expand_home(word) for word in (sys.argv[1:] if args is None else args)]
        self._refuse_repeated(words)
        words = self._with_values(words)
        if plugins.FLAG in self._option_string_actions:     # before choices are checked and --help lists them
            plugins.load_named(words)
        return super().parse_known_args(words, namespace)

    def _with_values(self, words: Sequence[str]) -> list[str]:
        """The words, with a value that begins with one dash, such as -5kimg or -4,4,8,8, joined to its flag.

        argparse takes such a word for a flag, and would say that the one before has no value.
        """
        takers = {name for parser in self._parsers() for action in parser._actions for name in action.option_strings
                  if name.startswith("--") and action.nargs is None}
        joined: list[str] = []
        for word in words:
            is_value = re.match(r"-[^-]", word) and not any(word in each._option_string_actions
                                                            for each in self._parsers())
            if is_value and joined and joined[-1] in takers:
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def _refuse_repeated(self, words: Sequence[str]) -> None:
        repeatable = {
            name for action in self._actions if isinstance(action, argparse._AppendAction)
            for name in action.option_strings
        }
        named = [word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]
        known = set(self.all_flags()) - repeatable
        for name in dict.fromkeys(named):
            if name in known and named.count(name) > 1:
                self.error(f"{name} is given {named.count(name)} times; give it once")

    def error(self, message: str) -> NoReturn:
        if launcher_rank() == 0:
            text = f"{self.prog}: error: {message}{self.suggestion(message)}\nSee {self.prog} --help."
            print(terminal.without_controls(text), file=sys.stderr)
        sys.exit(2)

    def suggestion(self, message: str) -> str:
        if "unrecognized arguments" not in message:
            return ""
        known = self.all_flags()
        unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        meant = {name: own for name, own in FOREIGN_FLAGS.items() if own.split(" ")[0] in known}
        near = []
        for word in unknown:                                # the same name first, then a similar one
            similar = get_close_matches(word, [*known, *meant], n=1)
            near += [meant[word]] if word in meant else [meant.get(name, name) for name in similar]
        return f". Did you mean {' '.join(near)}?" if near else ""

    def all_flags(self) -> list[str]:
        """Its own, and those of its commands: argparse leaves what these do not know to the whole."""
        return [name for parser in self._parsers() for action in parser._actions for name in action.option_strings]

    def _parsers(self) -> list[Parser]:
        """Itself, and the parsers of its commands."""
        commands = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [self, *(found for each in commands for command in each.values() for found in command._parsers())]

    def print_help(self, file: Any = None) -> None:
        if launcher_rank() == 0:
            terminal.demand_stdout()
            super().print_help(file)
            (file or sys.stdout).flush()


def expand_home(word: str) -> str:
    """'~/x' and '--flag=~/x' with the home folder spelled out."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(value) if value.startswith("~") else word


def with_names(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words of a command line before its first flag become the values of these flags, in order."""
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    named = [part for pair in zip(flags, arguments[:count]) for part in pair]
    return [*named, *arguments[min(count, len(flags)):]]


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag --device, as `cm.config.schema.RunConfig` has it."""
    parser.add_argument("--device", choices=tuple(DEVICES), default="auto",
                        help="where each rank computes; auto: on a GPU if there is one, else on the CPU "
                        "[default: auto]")


def positive(word: str) -> int:
    """The type of a flag that is a whole number of at least 1."""
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value
