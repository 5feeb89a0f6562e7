"""The order of the columns of a log: step and samples, losses, the rest, and the cost of the step."""

from __future__ import annotations

from collections.abc import Iterable

FIRST = ("step", "samples", "loss", "loss_q0", "loss_q1", "loss_q2", "loss_q3")
LAST = ("lr", "images_per_second", "elapsed_seconds")

_PLACES = {name: place for place, name in enumerate((*FIRST, "", *LAST))}


def ordered(names: Iterable[str]) -> list[str]:
    """`FIRST`, then the names that are in neither list as they were given, then `LAST`.

    >>> ordered(["lr", "grad_norm", "loss", "step"])
    ['step', 'loss', 'grad_norm', 'lr']
    """
    return sorted(names, key=lambda name: _PLACES.get(name, _PLACES[""]))
