"""Tables of the names that a flag accepts: look a name up, and add to a table from outside this repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from cm.errors import UserError, did_you_mean

Entry = TypeVar("Entry")

_added: dict[str, list[str]] = {}                           # `Table.what` -> registered names


class Table(dict[str, Entry]):
    """A table of components by name, to which a plugin may add entries; see docs/extending.md.

    :param what: the kind of its entries, as in messages: "sampler", "log format". `option(table=...)` of
        `cm.config.flags` refers to the table by this word.
    """

    def __init__(self, what: str, entries: Mapping[str, Entry]):
        super().__init__(entries)
        self.what = what

    def register(self, name: str, entry: Entry) -> Entry:
        """Add an entry before the existing ones: if several formats could open a file, the new one is used.

        :raises UserError: if the name is taken.
        """
        if name in self:
            raise UserError(f"the {self.what} {name!r} already exists: choose another name")
        before = dict(self)
        self.clear()
        self.update({name: entry, **before})
        _added.setdefault(self.what, []).append(name)
        return entry

    def unregister(self, name: str) -> None:
        """Remove an entry that `register` has added."""
        _added[self.what].remove(name)
        del self[name]


def added(what: str) -> tuple[str, ...]:
    """The names that were registered in the table of this word, so far."""
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
