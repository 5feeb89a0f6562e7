"""Tables of the names that a flag accepts: look a name up, and add to a table from outside this repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from cm.errors import UserError, did_you_mean

Entry = TypeVar("Entry")

WITH_FLAGS = {"objective": "objective", "training_mode": "objective", "sampler": "sampler"}
"""`Table.what` -> the flag of those commands that have the flags of its entries, too."""


class Registered(NamedTuple):
    """What `Table.register` was given."""

    name: str
    entry: Any
    flags: type | None


_added: dict[str, list[Registered]] = {}                    # by `Table.what`


class Table(dict[str, Entry]):
    """A table of components by name, to which a plugin may add entries; see docs/extending.md.

    :param what: the kind of its entries, as in messages: "sampler", "log format". `option(table=...)` of
        `cm.config.flags` refers to the table by this word.
    """

    def __init__(self, what: str, entries: Mapping[str, Entry]):
        super().__init__(entries)
        self.what = what

    def register(self, name: str, entry: Entry, flags: type | None = None) -> Entry:
        """Add an entry before the existing ones: if several formats could open a file, the new one is used.

        :param flags: a section of flags for the options of the entry, see `cm.config.flags`; commands that choose from
            this table have them, too.
        :raises UserError: if the name is taken, or no command would have the flags.
        """
        if name in self:
            raise UserError(f"the {self.what} {name!r} already exists: choose another name")
        if flags is not None and self.what not in WITH_FLAGS:
            raise UserError(f"the {self.what} {name!r} cannot add flags: only these can: {', '.join(WITH_FLAGS)}")
        before = dict(self)
        self.clear()
        self.update({name: entry, **before})
        _added.setdefault(self.what, []).append(Registered(name, entry, flags))
        return entry

    def unregister(self, name: str) -> None:
        """Remove an entry that `register` has added."""
        _added[self.what] = [each for each in _added[self.what] if each.name != name]
        del self[name]


def added(what: str) -> tuple[Registered, ...]:
    """What was registered in the table of this word, so far."""
    return tuple(_added.get(what, ()))


def lookup(table: Mapping[str, Entry], name: str, what: str = "name") -> Entry:
    """Return `table[name]`.

    :param table: one of the literal tables of this package, such as `SAMPLERS`.
    :param what: what the table lists, for the message: "sampler", "loss_norm".
    :raises UserError: if `name` is not in the table; the message lists the choices.
    """
    if name in table:
        return table[name]
    raise UserError(f"unknown {what} {name!r}; choose one of: {', '.join(table)}.{did_you_mean(name, table)}")
