"""Look up a name in a literal table; an unknown name is an error that lists the choices."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from cm.errors import UserError

Entry = TypeVar("Entry")


def lookup(table: Mapping[str, Entry], name: str, what: str = "name") -> Entry:
    """Return `table[name]`.

    :param table: one of the literal tables of this package, such as `SAMPLERS`.
    :param what: what the table lists, for the message: "sampler", "loss_norm".
    :raises UserError: if `name` is not in the table; the message lists the choices.
    """
    if name in table:
        return table[name]
    near = get_close_matches(str(name), table, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"unknown {what} {name!r}; choose one of: {', '.join(table)}.{hint}")
