"""The interface of a log format: a writer receives the flags, rows, pictures, lines, and how the run ended."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from cm.errors import UserError

Row = Mapping[str, Any]
"""Name -> number, in the order of `cm.logging.columns`; None where there was nothing to average."""

Status = Literal["finished", "stopped", "failed"]


class Writer:
    """The base class of log formats. A subclass overrides the methods for what it can show; the rest is ignored.

    Any method may raise OSError or UserError, having written nothing: a row is then tried again, all else is lost. Any
    other exception ends this writer, with one line on stderr, and never the run.
    """

    package: ClassVar[str] = ""
    """The package that it imports, which is the name of the extra that installs it, too; empty for none."""

    rows_wait: bool = True
    """Whether rows that cannot be written now are kept and written later."""

    @classmethod
    def open(cls, directory: Path, suffix: str) -> Writer:
        """The writer of a log in `directory`, which continues what is there.

        :param suffix: added to the names of its files.
        :raises OSError | UserError: if it cannot be opened; that ends the run before its first step.
        """
        raise NotImplementedError(f"{cls.__name__} cannot be opened by name")

    def config(self, flags: Mapping[str, Any]) -> None:
        """Record the resolved flags of the run; called once at its start."""

    def scalars(self, step: int | None, row: Row) -> None:
        """A row of numbers; `step` is that of the row, None if it has none."""

    def images(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture [H,W,3] uint8, such as a grid of samples."""

    def text(self, line: str) -> None:
        """A line of text."""

    def drop_after(self, step: int) -> None:
        """Remove the rows whose `step` is larger: a resumed run will write them again."""

    def close(self, status: Status) -> None:
        """Record how the run ended. It may be called again; later calls of other methods may be ignored."""


def require(kind: type[Writer], name: str) -> None:
    """Check that the package of a format is installed.

    :raises UserError: naming the extra that installs it.
    """
    if kind.package and find_spec(kind.package) is None:
        raise UserError(f"log format {name!r} needs the package {kind.package}, which is not installed: "
                        f"pip install '.[{kind.package}]'")
