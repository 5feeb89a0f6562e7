"""openai/consistency_models' `cm.logger`: rows of numbers and lines of text, and the formats they are written in.

A compatibility module in front of `cm.logging.logger`, whose current log it shares, and of `cm.logging.writers`. Files
that are there are continued, where the original empties them. Rows hold values of rank 0 only, so `comm` is refused:
the training loops log means over ranks already.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from cm.distributed.launchers import launcher_rank
from cm.errors import UserError
from cm.logging import logger as log_of_run
from cm.logging.columns import ordered
from cm.logging.csv_rows import CSVWriter
from cm.logging.json_lines import JSONWriter
from cm.logging.logger import (
    DEBUG,
    DISABLED,
    ERROR,
    INFO,
    WARN,
    debug,
    dumpkvs,
    error,
    get_current,
    get_dir,
    getkvs,
    info,
    log,
    logkv,
    logkv_mean,
    logkvs,
    profile_kv,
    reset,
    set_level,
    warn,
)
from cm.logging.tables import ScreenWriter, TableWriter
from cm.logging.tensorboard import TensorBoardWriter
from cm.logging.writers import Row, Status, Writer, require
from cm.registry import lookup

__all__ = [
    "CSVOutputFormat", "DEBUG", "DISABLED", "ERROR", "HumanOutputFormat", "INFO", "JSONOutputFormat", "KVWriter",
    "Logger", "SeqWriter", "TensorBoardOutputFormat", "WARN", "configure", "debug", "dump_tabular", "dumpkvs", "error",
    "get_current", "get_dir", "get_rank_without_mpi_import", "getkvs", "info", "log", "logkv", "logkv_mean", "logkvs",
    "make_output_format", "profile", "profile_kv", "record_tabular", "reset", "scoped_configure", "set_level", "warn",
]

Function = TypeVar("Function", bound=Callable[..., Any])

record_tabular = logkv
dump_tabular = dumpkvs


# --- formats ---------------------------------------------------------------------------------------------------------


class KVWriter:
    """A format of rows, to be derived from: a place where rows go."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write a row, name -> number."""
        raise NotImplementedError

    def drop_after(self, step: int) -> None:
        """Forget the rows whose `step` is larger, for a resumed run; nothing, unless a format can."""

    def close(self) -> None:
        """No row will follow; nothing, unless a format holds something open."""


class SeqWriter:
    """A format of lines of text, to be derived from."""

    def writeseq(self, seq: Iterable[Any]) -> None:
        """Write a line of words."""
        raise NotImplementedError


class _Format(KVWriter):
    """One of the toolkit's writers, by the original's methods."""

    def __init__(self, writer: Writer):
        self.writer = writer

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self.writer.scalars(kvs.get("step"), {name: kvs[name] for name in ordered(kvs)})

    def drop_after(self, step: int) -> None:
        self.writer.drop_after(step)

    def close(self) -> None:
        self.writer.close("finished")


class HumanOutputFormat(_Format, SeqWriter):
    """A table a row, and lines of text.

    :param filename_or_file: path of a file, or an open text file, which stays open.
    """

    def __init__(self, filename_or_file: str | os.PathLike[str] | TextIO):
        is_path = isinstance(filename_or_file, (str, os.PathLike))
        super().__init__(TableWriter(Path(filename_or_file)) if is_path else _FileWriter(filename_or_file))

    def writeseq(self, seq: Iterable[Any]) -> None:
        self.writer.text(" ".join(map(str, seq)))


class JSONOutputFormat(_Format):
    """An object a line.

    :param filename: the file, continued if it is there.
    """

    def __init__(self, filename: str | os.PathLike[str]):
        super().__init__(JSONWriter(Path(filename)))


class CSVOutputFormat(_Format):
    """A header, and one line a row; a new column appears in the old rows as an empty cell.

    :param filename: the file, continued if it is there.
    """

    def __init__(self, filename: str | os.PathLike[str]):
        super().__init__(CSVWriter(Path(filename)))


class TensorBoardOutputFormat(_Format):
    """A curve for each name, over `step` if the row has one.

    :param dir: folder of the event files.
    :raises UserError: if tensorboard is not installed.
    """

    def __init__(self, dir: str | os.PathLike[str]):
        require(TensorBoardWriter, "tensorboard")
        super().__init__(TensorBoardWriter(Path(dir)))


MAKERS: Mapping[str, Callable[[str, str], KVWriter]] = {
    "stdout": lambda folder, suffix: _StandardOutput(),
    "log": lambda folder, suffix: HumanOutputFormat(os.path.join(folder, f"log{suffix}.txt")),
    "json": lambda folder, suffix: JSONOutputFormat(os.path.join(folder, f"progress{suffix}.json")),
    "csv": lambda folder, suffix: CSVOutputFormat(os.path.join(folder, f"progress{suffix}.csv")),
    "tensorboard": lambda folder, suffix: TensorBoardOutputFormat(os.path.join(folder, f"tb{suffix}")),
}


class _StandardOutput(HumanOutputFormat):
    """Standard output as it is when a line is written, which a program may have redirected since."""

    def __init__(self) -> None:
        _Format.__init__(self, ScreenWriter())


class _FileWriter(ScreenWriter):
    """An open text file."""

    def __init__(self, file: Any):
        self.file = file

    def write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()


class _Adapted(Writer):
    """A format with the original's methods, as a writer."""

    def __init__(self, output: Any):
        self.output = output
        self.rows_wait = not isinstance(output, HumanOutputFormat)

    def scalars(self, step: int | None, row: Row) -> None:
        self.output.writekvs(row)

    def text(self, line: str) -> None:
        if isinstance(self.output, SeqWriter):
            self.output.writeseq([line])

    def close(self, status: Status) -> None:
        self.output.close()


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> KVWriter:
    """The format of a name: stdout, log, json, csv or tensorboard.

    :param ev_dir: folder of its file, made if it does not exist.
    :param log_suffix: added to the name of the file.
    :raises UserError: for an unknown name.
    """
    make = lookup(MAKERS, format, "log format")
    os.makedirs(ev_dir, exist_ok=True)
    return make(ev_dir, log_suffix)


# --- logs ------------------------------------------------------------------------------------------------------------


class Logger(log_of_run.Logger):
    """A log beside the current one.

    :param dir: what `get_dir` returns.
    :param output_formats: where rows go; lines of text go to those that are a SeqWriter.
    :raises UserError: for a `comm`.
    """

    def __init__(self, dir: str | None, output_formats: Sequence[KVWriter], comm: Any = None):
        _refuse(comm)
        super().__init__(dir, [_Adapted(output) for output in output_formats])


def configure(
    dir: str | os.PathLike[str] | None = None,
    format_strs: Sequence[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> None:
    """Start a log, or continue the one that is there; see `cm.logging.logger.configure`.

    :param dir: by default $OPENAI_LOGDIR, else a new folder in the system's temporary one.
    :param format_strs: names as in `make_output_format`, on rank 0.
    :param log_suffix: added to the names of the files.
    :raises UserError: if the folder cannot be written, for an unknown format, and for a `comm`.
    """
    _refuse(comm)
    log_of_run.configure(dir, format_strs, log_suffix)


def scoped_configure(
    dir: str | os.PathLike[str] | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> AbstractContextManager[None]:
    """Another log for the length of a `with` block.

    :raises UserError: as `configure`.
    """
    _refuse(comm)
    return log_of_run.scoped_configure(dir, format_strs)


def profile(n: str) -> Callable[[Function], Function]:
    """A decorator that adds the seconds spent in a function to `wait_<n>` of the row."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed                                        # pyright: ignore[reportReturnType]

    return decorate


def get_rank_without_mpi_import() -> int:
    """This process's rank by what its launcher says; 0 without one."""
    return launcher_rank()


def _refuse(comm: Any) -> None:
    if comm is not None:
        raise UserError(f"comm={comm!r}: rows are not averaged over ranks here; leave comm out, and log values "
                        "that are means over ranks already, by cm.dist_util.all_reduce_sum")
