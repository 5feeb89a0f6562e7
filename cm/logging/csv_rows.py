"""Log format csv: progress.csv, a header and one line for each row. An existing header keeps its order."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from cm.errors import UserError
from cm.logging.files import append, is_after, readable_text, replace_file
from cm.logging.writers import Row, Writer


class CSVWriter(Writer):
    """A table for tools; a cell is empty if its row has no number for its column."""

    def __init__(self, path: Path):
        self.path = path
        self.columns: list[str] = []
        rows = self.read()
        if rows is not None:
            self.rewrite(rows)

    @classmethod
    def open(cls, directory: Path, suffix: str) -> Writer:
        return cls(directory / f"progress{suffix}.csv")

    def read(self) -> list[dict[str, str]] | None:
        """The rows of the file, without a last one that a crash has cut off; None if there is no file.

        :raises UserError: if it is no CSV file.
        """
        if not self.path.exists():
            return None
        try:
            header, *rows = list(csv.reader(io.StringIO(readable_text(self.path), newline=""))) or [[]]
        except csv.Error as error:
            raise UserError(f"{self.path} is not a table of a run ({error}); remove it to continue without "
                            "it") from None
        self.columns = header
        if rows and len(rows[-1]) < len(header):
            rows.pop()
        return [dict(zip(header, row)) for row in rows]

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Replace the file by these rows."""
        replace_file(self.path, _as_csv(self.columns, rows, header=bool(self.columns)))

    def scalars(self, step: int | None, row: Row) -> None:
        """Append a row; new names become the last columns, for which the file is rewritten."""
        known = set(self.columns)
        new = [name for name in row if name not in known]
        if new or not self.path.exists():                   # somebody may have removed it with its header
            rows = self.read() or []
            wider = [*self.columns, *new]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, _as_csv(wider, [*rows, row], header=True))
            self.columns = wider
        else:
            append(self.path, _as_csv(self.columns, [row]))

    def drop_after(self, step: int) -> None:
        """Remove the rows whose `step` is larger."""
        rows = self.read()
        if rows is not None:
            self.rewrite(row for row in rows if not is_after(row, step))


def _as_csv(columns: Sequence[str], rows: Iterable[Row], header: bool = False) -> str:
    """Lines of a CSV file; what a row lacks is an empty cell."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
