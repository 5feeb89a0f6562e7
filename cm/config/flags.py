"""Frozen config dataclasses become command-line flags, a config file's keys, and back.

A section of flags is a frozen dataclass whose fields are made with `option`. Where a value comes from, and which source
wins over which, is its `Provenance`.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar, get_type_hints

from cm.config import plugins, presets
from cm.config.help import Help
from cm.distributed.launchers import launcher_rank
from cm.errors import UserError
from cm.io import terminal
from cm.io.budget import SETTINGS, read_bytes
from cm.io.untrusted import shown
from cm.registry import added

Section = TypeVar("Section")


def option(
    default: Any, help: str, *, choices: Sequence[str] = (), minimum: float | None = None,
    maximum: float | None = None, below: float | None = None, infinite: bool = False, aliases: Sequence[str] = (),
    several: bool = False, table: str = "",
) -> Any:
    """A field of a section: its default, one sentence for --help, what is allowed, and other names of the flag.

    :param below: the value must be less than this.
    :param infinite: infinity is allowed; a value that is not a number never is.
    :param several: the value is a comma-separated list of choices, which may be empty.
    :param table: what the `cm.registry.Table` behind the choices lists; what a plugin adds to it is a choice, too.
    """
    allowed = {
        "choices": tuple(choices), "minimum": minimum, "maximum": maximum, "below": below, "infinite": infinite,
        "several": several, "table": table,
    }
    return dataclasses.field(default=default, metadata={"help": help, "aliases": tuple(aliases), **allowed})


def str2bool(value: str | bool) -> bool:
    """yes/true/t/y/1 and no/false/f/n/0 in any case."""
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is not a boolean; write True or False")


class Provenance(enum.IntEnum):
    """Where the value of a flag comes from; the higher wins."""

    DEFAULT = 0
    CHECKPOINT = 1                              # the file of weights that the run starts from
    FILE = 2                                    # --config
    COMMAND_LINE = 3


@dataclass(frozen=True)
class Origin:
    """The place that sets a flag: its kind, and how a message names it ("--lr", "run.yaml", "the checkpoint x.pt")."""

    kind: Provenance
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass
class Settings:
    """The flags of a run while they are resolved; components take frozen sections of them."""

    values: dict[str, Any]
    given: dict[str, Origin]                    # of every flag that is not at its default
    dry_run: bool = False
    sources: dict[str, Any] = dataclasses.field(default_factory=dict)     # flag -> the file of weights that it names

    def provenance(self, name: str) -> Provenance:
        """Where the value of a flag comes from."""
        return self.given[name].kind if name in self.given else Provenance.DEFAULT

    def is_given(self, name: str) -> bool:
        """Whether the command line, a file or a checkpoint sets the flag."""
        return name in self.given

    def section(self, kind: type[Section]) -> Section:
        """The part of the settings that a section describes."""
        return kind(**{name: self.values[name] for name in defaults_of(kind)})

    def inherit(self, values: Mapping[str, Any], source: str) -> None:
        """Take values that a checkpoint knows; what was asked for must agree with them.

        :param source: how messages name the checkpoint.

        :raises UserError: naming the flag, both values and both places.
        """
        for name, value in values.items():
            if name not in self.values:
                continue
            if name in self.given and not same(self.values[name], value):
                raise UserError(
                    f"{self.given[name]} asks for {name}={self.values[name]!r}, but {source} was made with "
                    f"{name}={value!r}; drop the flag or choose another checkpoint"
                )
            self.values[name] = value
            self.given.setdefault(name, Origin(Provenance.CHECKPOINT, source))

    def replace(self, **changes: Any) -> None:
        """Set values that the run itself works out, such as the number of classes in the data."""
        self.values.update(changes)

    def as_text(self) -> str:
        """The whole run as JSON, which --config reads back."""
        return json.dumps(self.values, indent=2)


def same(a: Any, b: Any) -> bool:
    """Equal as settings: '32,16,8' is '32, 16, 8', and 1 is 1.0."""
    def plain(value: Any) -> Any:
        return value.replace(" ", "") if isinstance(value, str) else value
    return plain(a) == plain(b)


FOREIGN_FLAGS = {
    "--network": "--model_path", "--batch": "--global_batch_size", "--batch-gpu": "--microbatch",
    "--duration": "--total_kimg (EDM's --duration counts thousands of them)", "--cbase": "--num_channels",
    "--cres": "--channel_mult", "--cond": "--class_cond", "--xflip": "--random_flip", "--class": "--class_label",
    "--stf": "--objective stf", "--transfer": "--resume_checkpoint", "--ls": "--fp16_scale_growth",
    "--fp16": "--use_fp16", "--ema": "--ema_halflife_kimg", "--data": "--data_dir", "--workers": "--num_workers",
    "--batch-size": "--batch_size", "--num-steps": "--steps", "--num_steps": "--steps",
}
"""Flags of other tools -> ours, for a command that has ours and not theirs."""


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
        if plugins.FLAG in self._option_string_actions:     # before choices are checked and --help lists them
            for path in plugins.named(words):
                plugins.load(path)
        return super().parse_known_args(words, namespace)

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
        near = []
        for word in unknown:
            foreign = FOREIGN_FLAGS.get(word, "")
            near += [foreign] if foreign.split(" ")[0] in known else get_close_matches(word, known, n=1)
        return f". Did you mean {' '.join(near)}?" if near else ""

    def all_flags(self) -> list[str]:
        """Its own, and those of its commands: argparse leaves what these do not know to the whole."""
        own = [name for action in self._actions for name in action.option_strings]
        commands = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return own + [name for each in commands for command in each.values() for name in command.all_flags()]

    def print_help(self, file: Any = None) -> None:
        if launcher_rank() == 0:
            super().print_help(file)


def expand_home(word: str) -> str:
    """'~/x' and '--flag=~/x' with the home folder spelled out."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(value) if value.startswith("~") else word


def with_names(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The first words of a command line, as far as they are no flags, become the values of these flags, in order."""
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    named = [part for pair in zip(flags, arguments[:count]) for part in pair]
    return [*named, *arguments[min(count, len(flags)):]]


def positive(word: str) -> int:
    """The type of a flag that is a whole number of at least 1."""
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def parse(
    description: str | None, *sections: type, argv: Sequence[str] | None = None, first: Sequence[str] = (),
    **defaults: Any,
) -> Settings:
    """Read the flags of a script.

    :param sections: config dataclasses; each is a group of --help, titled by the first line of its docstring.
    :param first: the flags that --help shows; the others are shown by `--help all`. Empty: all.
    :param defaults: defaults of this script where they differ from the section's.
    :raises UserError: if the config file is missing, unreadable or has an unknown key, a value is not allowed, or two
        names of one flag have different values.
    """
    fields = {field.name: field for section in sections for field in dataclasses.fields(section)}
    types = {name: kind for section in sections for name, kind in get_type_hints(section).items()}
    parser = make_parser(description, sections, types, defaults, first)
    args = vars(parser.parse_args(argv))
    config_file, dry_run = args.pop("config"), args.pop("dry_run")
    args.pop(plugins.NAME)

    values = {name: defaults.get(name, field.default) for name, field in fields.items()}
    given: dict[str, Origin] = {}
    if config_file:
        for name, value in read_config(config_file, fields).items():
            values[name] = convert(types[name], value, f"{config_file}: {name}")
            given[name] = Origin(Provenance.FILE, config_file)
    spelt = {field.name: alias for field in fields.values() for alias in field.metadata["aliases"] if alias in args}
    for name, value in by_own_name(args, fields, "").items():
        values[name] = value
        given[name] = Origin(Provenance.COMMAND_LINE, f"--{spelt.get(name, name)}")
    for name, value in values.items():
        check(fields[name], value, str(given.get(name, f"--{name}")))
    terminal.keep_stdout_for_data(dry_run)
    return Settings(values, given, dry_run)


def resolve(values: Mapping[str, Any], *sections: type) -> Settings:
    """Settings from Python values instead of words; `parse` for callers that are programs.

    :param values: by the names of flags; the others keep their defaults.
    :raises UserError: for a name that no section has, or a value that is not allowed.
    """
    settings = Settings({name: value for section in sections for name, value in defaults_of(section).items()}, {})
    give(settings, values, *sections)
    return settings


def give(settings: Settings, values: Mapping[str, Any], *sections: type) -> None:
    """Set flags as if the command line had them.

    :raises UserError: for a name that no section has, or a value that is not allowed.
    """
    fields = {field.name: field for section in sections for field in dataclasses.fields(section)}
    types = {name: kind for section in sections for name, kind in get_type_hints(section).items()}
    for name, value in values.items():
        if name not in fields:
            near = get_close_matches(name, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"there is no option {name!r}.{hint}")
        settings.values[name] = convert(types[name], value, name)
        settings.given[name] = Origin(Provenance.COMMAND_LINE, name)
        check(fields[name], settings.values[name], name)


def make_parser(
    description: str | None, sections: Sequence[type], types: Mapping[str, type], defaults: dict,
    first: Sequence[str] = (),
) -> Parser:
    parser = Parser(
        description=description, usage="%(prog)s [--flag VALUE ...]", allow_abbrev=False, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-h", "--help", action=Help, first=first)
    parser.add_argument("--config", default="", metavar="FILE", help="YAML or JSON file of flags; flags given here win")
    parser.add_argument("--dry_run", action="store_true",
                        help="print the resolved run, check what it would read and write, and exit")
    plugins.add_flag(parser)
    for section in sections:
        group = parser.add_argument_group((section.__doc__ or section.__name__).splitlines()[0])
        for field in own_first(section):
            default = defaults.get(field.name, field.default)
            choices = choices_of(field)
            shown = f" (choices: {', '.join(choices)})" if choices else ""
            kind = types[field.name]
            others = "".join(f", also --{alias}" for alias in field.metadata["aliases"])
            help = f"{field.metadata['help']}{shown}{others} [default: {default!r}]".replace("%", "%%")
            for name in (field.name, *field.metadata["aliases"]):
                group.add_argument(
                    f"--{name}",
                    type=str2bool if kind is bool else kind,
                    nargs="?" if kind is bool else None,            # --flag alone is --flag True
                    const=True if kind is bool else None,
                    default=argparse.SUPPRESS,
                    metavar=kind.__name__.upper(),
                    help=help if name == field.name else argparse.SUPPRESS,
                )
    return parser


def own_first(section: type) -> list[dataclasses.Field]:
    """The flags of a section as --help lists them: what it shares with other sections comes last."""
    return sorted(dataclasses.fields(section), key=lambda field: field.name not in section.__annotations__)


def by_own_name(given: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by the flags' own names, where `given` may use their aliases.

    :raises UserError: if two names of one flag are given with different values.
    """
    own = {alias: name for name, field in fields.items() for alias in field.metadata["aliases"]}
    found: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for word, value in given.items():
        name = own.get(word, word)
        if name in found and found[name] != value:
            raise UserError(f"{where}--{spelt[name]} and --{word} are one flag under two names, but {found[name]!r} "
                            f"and {value!r} two values; drop one of them")
        found[name], spelt[name] = value, word
    return found


def read_config(path: str, fields: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a flat mapping of flags from YAML or JSON; nothing in it is ever executed.

    The key `base` names another file, relative to this one, for what is not set here.

    :param path: a file, or the name of a preset such as digits/edm.
    """
    path = presets.find(path)
    try:
        content = parse_flat(read_bytes(path, SETTINGS))
    except UserError as error:
        raise UserError(f"--config {error}") from None
    except FileNotFoundError as error:
        raise UserError(f"--config {path}: {error.strerror}{presets.suggestion(path)}") from None
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--config {path} is neither YAML nor JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold `flag: value` lines, not a {type(content).__name__}")
    base = content.pop("base", "")
    content = by_own_name(content, fields, f"--config {path}: ")
    for name in content:
        if name not in fields:
            near = get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"--config {path}: {shown(name)} is no flag of this script{hint}")
    if not base:
        return content
    base = os.path.normpath(os.path.join(os.path.dirname(path), str(base)))
    if base in above:
        raise UserError(f"--config {path}: its base {base} builds on this file in turn")
    return read_config(base, fields, (*above, base)) | content


def parse_flat(text: bytes) -> Any:
    """A mapping of plain values and lists of them, from YAML or JSON; {} for an empty text.

    :raises ValueError: if it is neither, nested deeper, gives a key twice or none a value, or has aliases, by which a
        short text unfolds to a huge one.
    """
    import yaml

    try:
        depth, scalars, lines = 0, 0, {}
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = f"line {event.start_mark.line + 1}"
            if depth > 2:
                raise ValueError(f"{line}: a value is a word, a number or a list of those")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{line}: aliases (*{event.anchor}) are not read")
            if depth == 1 and isinstance(event, (yaml.ScalarEvent, yaml.CollectionEndEvent)):
                scalars += 1                                # at this depth keys and values take turns
                if scalars % 2 and isinstance(event, yaml.ScalarEvent):
                    if event.value in lines:
                        raise ValueError(f"{line}: {event.value} is given twice, first in {lines[event.value]}")
                    lines[event.value] = line
        content = yaml.safe_load(text) or {}
        for name, value in content.items() if isinstance(content, dict) else ():
            if value is None:
                line = lines.get(str(name), "some line")
                raise ValueError(f"{line}: {name} has no value; write \"\" for an empty one")
        return content
    except MemoryError:
        raise
    except Exception as error:                              # such as of a date that the calendar does not have
        raise ValueError(str(error) or repr(error)) from None


def convert(kind: type, value: Any, where: str) -> Any:
    """A value of a config file as the type its flag has."""
    try:
        if kind is bool:
            return str2bool(value)
        if isinstance(value, bool):                         # true is no number, and a word only where it is quoted
            raise ValueError
        if kind is str and isinstance(value, str):
            return expand_home(value)
        if kind is str and isinstance(value, (list, tuple)):
            return ",".join(str(item) for item in value)
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, OverflowError, argparse.ArgumentTypeError):
        raise UserError(f"{where}={shown(value)} is not a {kind.__name__}") from None


def check(field: dataclasses.Field, value: Any, where: str) -> None:
    limits = field.metadata
    choices, minimum = choices_of(field), limits["minimum"]
    for word in words_of(value) if limits["several"] else [value]:
        if choices and word not in choices:
            near = get_close_matches(str(word), choices, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            hint += f" {plugins.FLAG} FILE may add others." if limits["table"] else ""
            raise UserError(f"{where}: {field.name}={word!r} is not one of: {', '.join(choices)}.{hint}")
    if isinstance(value, float) and not math.isfinite(value) and not (limits["infinite"] and value == math.inf):
        raise UserError(f"{where}: {field.name}={value!r} is not a finite number")
    if minimum is not None and value < minimum:
        raise UserError(f"{where}: {field.name}={value!r} is too small; the least is {minimum}")
    if limits["maximum"] is not None and value > limits["maximum"]:
        raise UserError(f"{where}: {field.name}={value!r} is too large; the largest is {limits['maximum']}")
    if limits["below"] is not None and not value < limits["below"]:
        raise UserError(f"{where}: {field.name}={value!r} is too large; it must be below {limits['below']:g}")


def choices_of(field: dataclasses.Field) -> tuple[str, ...]:
    """What the field lists, and what was added to the table behind it; empty if any value will do."""
    return (*field.metadata["choices"], *added(field.metadata["table"]))


def words_of(text: str) -> list[str]:
    """'csv, json' -> ['csv', 'json']."""
    return [word.strip() for word in text.split(",") if word.strip()]


def defaults_of(section: type) -> dict[str, Any]:
    """The defaults of a section's flags, by name."""
    return {field.name: field.default for field in dataclasses.fields(section)}
