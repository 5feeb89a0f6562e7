"""List the licences of this package and of all that are installed with it: `make licences`.

What a package says of itself: the expression License-Expression, else its classifiers, else the field License.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from typing import Protocol

PREFIX = "License :: "
UNKNOWN = "UNKNOWN"
LONGEST = 60                                                # characters; some put the whole text into the field


class Metadata(Protocol):
    """The headers of a package, of which some occur several times."""

    def get_all(self, name: str) -> list[str] | None:
        """The values of a header; None if there is none."""
        ...


def licence_of(metadata: Metadata) -> str:
    """'MIT', 'Apache-2.0 OR BSD-2-Clause', 'BSD License'; UNKNOWN if nothing is said."""
    expression = first(metadata, "License-Expression")
    if expression:
        return expression
    classifiers = [each for each in metadata.get_all("Classifier") or [] if each.startswith(PREFIX)]
    named = [each.rpartition(" :: ")[2] for each in classifiers if each != f"{PREFIX}OSI Approved"]
    if named:
        return "; ".join(dict.fromkeys(named))
    text = first(metadata, "License")
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line[: LONGEST - 3] + "..." if len(line) > LONGEST else line or UNKNOWN


def first(metadata: Metadata, name: str) -> str:
    """A header's first value that says something; empty without one."""
    values = (value.strip() for value in metadata.get_all(name) or [])
    return next((value for value in values if value and value.upper() != UNKNOWN), "")


def table(packages: Iterable[Distribution]) -> str:
    """A line for each package: name, version, licence."""
    rows = {
        re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower(): (each.metadata["Name"], each.version,
                                                                licence_of(each.metadata))
        for each in packages
    }
    columns = [max(map(len, column)) for column in zip(*rows.values())]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(rows[name], columns)).rstrip()
                     for name in sorted(rows))


if __name__ == "__main__":
    print(table(distributions()))
