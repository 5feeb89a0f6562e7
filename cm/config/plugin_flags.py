"""The flags of components that a plugin has registered: which commands have them, and what makes one wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from cm.errors import UserError
from cm.registry import WITH_FLAGS, Registered, added


def with_registered(sections: Sequence[type]) -> tuple[type, ...]:
    """The sections of a command, and those that were registered with components which the command chooses.

    :raises UserError: for a flag that the command has already, or that its component would not read.
    """
    taken = names_of(*sections)
    found: dict[type, Registered] = {}
    for what, flag in WITH_FLAGS.items():
        for each in added(what) if flag in taken else ():
            if each.flags is None:
                continue
            _check(each, what)
            if each.flags not in found and (again := names_of(each.flags) & taken):
                raise UserError(f"the {what} {each.name!r} adds the flag --{min(again)}, which exists already: choose "
                                "another name")
            found[each.flags] = each
            taken |= names_of(each.flags)
    return (*sections, *found)


def registered_sections(what: str) -> list[type]:
    """The sections that were registered with components of a table."""
    return list(dict.fromkeys(each.flags for each in added(what) if each.flags is not None))


def names_of(*sections: Any) -> set[str]:
    """The flags of sections, and their other names."""
    fields = [field for section in sections for field in dataclasses.fields(section)]
    return {name for field in fields for name in (field.name, *field.metadata.get("aliases", ()))}


def _check(each: Registered, what: str) -> None:
    """:raises UserError: unless all flags are made with `option` and read by the component."""
    where = f"the flags of the {what} {each.name!r}"
    fields = dataclasses.fields(each.flags) if dataclasses.is_dataclass(each.flags) else ()
    if not fields or any("help" not in field.metadata for field in fields):
        raise UserError(f"{where}: make them fields of a frozen dataclass, each by cm.config.flags.option")
    read, place = _read_by(each.entry, WITH_FLAGS[what] == "objective")
    unread = [field.name for field in fields if field.name not in read]
    if unread:
        raise UserError(f"{where}: {unread[0]} would have no effect: {place}")


def _read_by(entry: Any, is_objective: bool) -> tuple[Collection[str], str]:
    """The flags that a component reads, and what it needs to read another."""
    if is_objective:
        return entry.options, "its `options` must list it"
    return names_of(entry) if dataclasses.is_dataclass(entry) else (), "it needs a field of that name"
