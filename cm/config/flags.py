"""Frozen config dataclasses become command-line flags, a config file's keys, and back.

A section of flags is a frozen dataclass; its fields are made with `option`. `Provenance` says where a value comes from,
and which source wins over which.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from cm.config import plugins
from cm.config.config_file import by_own_name, read_config
from cm.config.help import Help
from cm.config.parser import Parser, expand_home
from cm.config.plugin_flags import with_registered
from cm.errors import UserError, did_you_mean
from cm.io import terminal
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
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)    # of the command

    def provenance(self, name: str) -> Provenance:
        """Where the value of a flag comes from."""
        return self.given[name].kind if name in self.given else Provenance.DEFAULT

    def is_given(self, name: str) -> bool:
        """Whether the command line, a file or a checkpoint sets the flag."""
        return name in self.given

    def is_typed(self, name: str) -> bool:
        """Whether the command line sets the flag: a file may hold every flag of another run."""
        return self.provenance(name) == Provenance.COMMAND_LINE

    def spelling(self, name: str) -> str:
        """The flag as a message names it: as it was typed, which may be an alias, or else by its name."""
        return str(self.given[name]) if self.is_typed(name) else f"--{name}"

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
    plugins.load_named(sys.argv[1:] if argv is None else argv)      # before the flags, to which they may add
    sections = with_registered(sections)
    fields = {field.name: field for section in sections for field in dataclasses.fields(section)}
    types = {name: kind for section in sections for name, kind in get_type_hints(section).items()}
    parser = make_parser(description, sections, types, defaults, first)
    args = vars(parser.parse_args(argv))
    config_file, dry_run = args.pop("config"), args.pop("dry_run")
    args.pop(plugins.NAME)

    own = {name: defaults.get(name, field.default) for name, field in fields.items()}
    values = dict(own)
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
    return Settings(values, given, dry_run, defaults=own)


def resolve(values: Mapping[str, Any], *sections: type) -> Settings:
    """Settings from Python values instead of words; `parse` for callers that are programs.

    :param values: by the names of flags; the others keep their defaults.
    :raises UserError: for a name that no section has, or a value that is not allowed.
    """
    own = {name: value for section in with_registered(sections) for name, value in defaults_of(section).items()}
    settings = Settings(dict(own), {}, defaults=own)
    give(settings, values, *sections)
    return settings


def give(settings: Settings, values: Mapping[str, Any], *sections: type) -> None:
    """Set flags as if the command line had them.

    :raises UserError: for a name that no section has, or a value that is not allowed.
    """
    sections = with_registered(sections)
    fields = {field.name: field for section in sections for field in dataclasses.fields(section)}
    types = {name: kind for section in sections for name, kind in get_type_hints(section).items()}
    for name, field in fields.items():                      # of a component that was registered since
        settings.values.setdefault(name, field.default)
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"there is no option {name!r}.{did_you_mean(name, fields)}")
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
    parser.add_argument("--config", default="", metavar="FILE",
                        help="YAML or JSON file of flags; flags on the command line take precedence")
    parser.add_argument("--dry_run", action="store_true",
                        help="print the resolved settings, check the inputs and outputs, and exit")
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


def convert(kind: type, value: Any, where: str) -> Any:
    """A value of a config file as the type its flag has."""
    try:
        if kind is bool:
            return str2bool(value)
        if isinstance(value, bool):                         # YAML's true is not a number, and not a word unless quoted
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
            hint = did_you_mean(word, choices)
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
    """The choices of a field, with those that plugins added to its table; empty if any value is allowed."""
    return (*field.metadata["choices"], *(each.name for each in added(field.metadata["table"])))


def words_of(text: str) -> list[str]:
    """'csv, json' -> ['csv', 'json']."""
    return [word.strip() for word in text.split(",") if word.strip()]


def defaults_of(section: type) -> dict[str, Any]:
    """The defaults of a section's flags, by name."""
    return {field.name: field.default for field in dataclasses.fields(section)}
