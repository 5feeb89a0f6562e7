"""Runs as a page names and draws them: a name, a colour and a line style that distinguish each from the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cm.report.names import run_names
from cm.report.run_records import RunRecord
from cm.report.svg import COLOURS, DASHES


@dataclass(frozen=True)
class Run:
    """A run as the page names it."""

    name: str
    number: int                                                     # its place among the runs of the page
    record: RunRecord

    @property
    def colour(self) -> int:
        """A number of the style sheet."""
        return self.number % COLOURS

    @property
    def dash(self) -> int:
        """The dash pattern of its lines, chosen like `colour`."""
        return self.number // COLOURS % DASHES


def named_runs(records: Sequence[RunRecord]) -> list[Run]:
    """The runs by the shortest names that distinguish them."""
    names = run_names([record.path for record in records])
    return [Run(name, number, record) for number, (name, record) in enumerate(zip(names, records))]
