"""Rows of numbers and lines of text, to the screen and to files: guided-diffusion's logger, names and files kept.

    logger.configure(dir, rank=dist_util.get_rank())
    logger.logkv_mean("loss", loss)         # a tensor stays on its device until the row is written
    logger.logkv("step", step)
    logger.dumpkvs()

Formats: "stdout" and "log" (log.txt) show tables, "csv" (progress.csv) and "json" (progress.json, one object per line)
hold one row per dump, "tensorboard" (tb/) and "wandb" (wandb/) show curves and pictures. A log that is already in the
directory is continued: old rows stay, and a new column appears in the old rows as an empty cell.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from cm.distributed import failure
from cm.distributed.launchers import launcher_rank
from cm.errors import UserError
from cm.io import terminal
from cm.logging import FORMATS
from cm.logging.columns import ordered
from cm.logging.tables import ScreenWriter
from cm.logging.writers import Status, Writer, require
from cm.registry import lookup

WAITING_ROWS = 10_000
"""Number of rows kept in memory while the disk is full; if there are more, the oldest are lost."""

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50


class Logger:
    """The current row, and the writers that rows go to. The functions of this module use the current logger.

    :param directory: None: rows and text go to the screen only.
    :param level: least level of the text that is shown.
    """

    def __init__(self, directory: str | None, writers: Sequence[Writer], level: int = INFO):
        self.directory, self.writers, self.level = directory, list(writers), level
        self.values: dict[str, Any] = {}
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.waiting: dict[int, list[dict[str, Any]]] = {}      # rows that a writer could not write yet
        self.is_stuck = False                                   # whether that was reported

    def logkv(self, key: str, val: Any) -> None:
        """See the function of this name."""
        self.values[key] = _scalar(key, val)

    def logkv_mean(self, key: str, val: Any) -> None:
        """See the function of this name."""
        value = _scalar(key, val)
        if _is_tensor(value) and value.device.type != "mps":     # which has no float64
            value = value.double()
        self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counts[key] = self.counts.get(key, 0) + 1

    def row(self) -> dict[str, Any]:
        """The row so far, as plain numbers in the order of its columns."""
        means = {key: total / self.counts[key] for key, total in self.sums.items()}
        row = _to_numbers({**self.values, **means})
        return {name: row[name] for name in ordered(row)}

    def dumpkvs(self) -> dict[str, Any]:
        """See the function of this name."""
        row = self.row()
        if self.level < DISABLED:
            self.is_stuck = not all([self.write_row(writer, row) for writer in list(self.writers)])
        for held in (self.values, self.sums, self.counts):
            held.clear()
        return row

    def write_row(self, writer: Writer, row: dict[str, Any]) -> bool:
        """Give a row to a writer, after earlier rows that are still waiting; returns whether all could be written.

        A full disk must not end a run, so rows of numbers wait until there is space. Rows of tables are lost.
        """
        rows = self.waiting.setdefault(id(writer), [])
        rows.append(row)

        def write() -> None:
            while rows:
                writer.scalars(rows[0].get("step"), rows[0])
                rows.pop(0)

        written = self.tell(writer, write)
        del rows[: -WAITING_ROWS if writer.rows_wait else None]
        return written

    def tell(self, writer: Writer, what: Callable[[], None]) -> bool:
        """Call a method of a writer; returns False if it could not write. A writer with any other error is removed."""
        try:
            what()
        except (OSError, UserError) as error:
            self.report_failure(error)
            return False
        except Exception as error:
            self.writers.remove(writer)
            failure.say(f"log format {name_of(writer)} failed ({type(error).__name__}: {error}); the run continues "
                        "without it")
        return True

    def tell_all(self, what: Callable[[Writer], None]) -> None:
        """Call a method of every writer."""
        for writer in list(self.writers):
            self.tell(writer, lambda writer=writer: what(writer))

    def config(self, flags: Mapping[str, Any]) -> None:
        """See `log_config`."""
        self.tell_all(lambda writer: writer.config(flags))

    def images(self, step: int, name: str, picture: np.ndarray) -> None:
        """See `log_images`."""
        self.tell_all(lambda writer: writer.images(step, name, picture))

    def log(self, *args: Any, level: int = INFO) -> None:
        """See the function of this name."""
        if self.level <= level:
            self.tell_all(lambda writer: writer.text(" ".join(map(str, args))))

    def report_failure(self, error: OSError | UserError) -> None:
        """Print that the log cannot be written; only once, until it can be written again."""
        if not self.is_stuck:
            self.is_stuck = True
            reason = error.strerror if isinstance(error, OSError) else error
            failure.say(f"the log in {self.directory} cannot be written ({reason}); the run continues, and its rows "
                        "wait until there is space")

    def set_level(self, level: int) -> None:
        """The least level of `log` that is shown."""
        self.level = level

    def get_dir(self) -> str | None:
        """The folder of the files of this log; None without files."""
        return self.directory

    def close(self, status: Status = "finished") -> None:
        """See `close`."""
        self.tell_all(lambda writer: writer.close(status))


_default = Logger(None, [ScreenWriter()] if launcher_rank() == 0 else [])
_current = _default


def configure(
    dir: str | os.PathLike | None = None,
    format_strs: Sequence[str] | None = None,
    log_suffix: str = "",
    rank: int | None = None,
    resume_step: int | None = None,
    also: Sequence[str] = (),
) -> None:
    """Start a log, or continue the one that is in the directory.

    :param dir: created if necessary; by default $OPENAI_LOGDIR, else a new folder in the system's temporary one.
    :param format_strs: names from `FORMATS`; by default $OPENAI_LOG_FORMAT, else stdout, log and csv.
    :param log_suffix: added to the names of the files.
    :param rank: only rank 0 writes, unless $OPENAI_LOG_FORMAT_MPI names formats for the others, whose files then end
        in -rank001 and so on. By default the launcher's.
    :param also: further formats of rank 0.
    :param resume_step: the step a resumed run starts from; rows after it are dropped.
    :raises UserError: if the directory cannot be made or written, there is no such format, or its package is missing.
    """
    global _current
    rank = launcher_rank() if rank is None else rank
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
        format_strs = _names(os.environ.get("OPENAI_LOG_FORMAT_MPI", ""))
    elif format_strs is None:
        format_strs = _names(os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv"))
    if rank == 0:
        format_strs = [*format_strs, *also]
    kinds = {name: lookup(FORMATS, name, "log format") for name in format_strs}
    for name, kind in kinds.items():
        require(kind, name)
    named = dir or os.environ.get("OPENAI_LOGDIR")
    dir = str(named or _default_directory())
    if "://" in dir:
        raise UserError(f"logs are written to a local directory, and {dir} is not one: choose another --log_dir")
    directory = Path(dir).expanduser().absolute()
    try:
        if kinds:
            directory.mkdir(parents=True, exist_ok=bool(named))     # in a folder of all users, only a new one
        writers = [kind.open(directory, log_suffix) for kind in kinds.values()]
    except OSError as error:
        raise UserError(
            f"cannot write a log to {terminal.printable(str(directory))}: {error.strerror}; choose another --log_dir"
        ) from None
    reset()
    _current = Logger(str(directory), writers)
    if resume_step is not None:
        drop_after(resume_step)


def drop_after(step: int) -> None:
    """Remove the rows whose `step` is larger, because the run resumes from there and will write them again."""
    for writer in _current.writers:
        writer.drop_after(step)


def log_config(flags: Mapping[str, Any]) -> None:
    """Show the resolved flags of the run, in the formats that can."""
    _current.config(flags)


def log_images(step: int, name: str, picture: np.ndarray) -> None:
    """Show a picture [H,W,3] uint8, in the formats that can."""
    _current.images(step, name, picture)


def close(status: Status) -> None:
    """Tell all formats how the run ended. Lines of text can still be logged."""
    _current.close(status)


def name_of(writer: Writer) -> str:
    """The name of a writer's format; that of its class, if the table lacks it."""
    return next((name for name, kind in FORMATS.items() if type(writer) is kind), type(writer).__name__)


def reset() -> None:
    """Close the log; from now on text and tables go to the screen only."""
    global _current
    if _current is not _default:
        _current.close()
        _current = _default


@contextlib.contextmanager
def scoped_configure(dir: str | os.PathLike | None = None, format_strs: Sequence[str] | None = None) -> Iterator[None]:
    """Use another log inside the `with` block."""
    global _current
    outer, _current = _current, _default
    try:
        configure(dir, format_strs)
        yield
    finally:
        reset()
        _current = outer


def get_current() -> Logger:
    """The log that the functions of this module use."""
    return _current


def logkv(key: str, val: Any) -> None:
    """Put a number, or a tensor of one element, into the row; the last value of a key stays."""
    _current.logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Like `logkv`, but the row gets the mean of all values. A tensor causes no synchronization before `dumpkvs`."""
    _current.logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """`logkv` for each item."""
    for key, value in d.items():
        logkv(key, value)


def getkvs() -> dict[str, Any]:
    """The row so far."""
    return _current.row()


def dumpkvs() -> dict[str, Any]:
    """Write the row, empty it, and return what was written."""
    return _current.dumpkvs()


def log(*args: Any, level: int = INFO) -> None:
    """A line of text, to stdout and log.txt, if the level is at least that of `set_level`."""
    _current.log(*args, level=level)


def debug(*args: Any) -> None:
    """`log` at level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """`log` at level INFO."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """`log` at level WARN."""
    log(*args, level=WARN)


def error(*args: Any) -> None:
    """`log` at level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """The least level of `log` that is shown, for the current log."""
    _current.set_level(level)


def get_dir() -> str:
    """The directory of the log; configures one if there is none yet."""
    if _current.directory is None:
        configure()
    assert _current.directory is not None, "`configure` sets it"
    return _current.directory


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds spent inside to `wait_<scopename>` of the row."""
    key, start_time = f"wait_{scopename}", time.monotonic()
    try:
        yield
    finally:
        _current.values[key] = _current.values.get(key, 0.0) + time.monotonic() - start_time


def _default_directory() -> str:
    """A new folder in the system's temporary one, named by the time, as in guided-diffusion."""
    stamp = datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
    return os.path.join(tempfile.gettempdir(), stamp)


def _names(text: str) -> list[str]:
    """'csv, json' -> ['csv', 'json']."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor. This does not import torch, which programs that only read logs do not need."""
    return hasattr(value, "detach")


def _scalar(key: str, value: Any) -> Any:
    """A plain value, or a tensor without its graph."""
    shape = tuple(value.shape) if _is_tensor(value) else np.shape(value)
    if np.prod(shape) != 1:
        raise ValueError(f"{key!r} has shape {shape}; a row holds single numbers: log its mean")
    return value.detach().reshape(()) if _is_tensor(value) else value


def _to_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Tensors and numpy scalars as plain numbers, with one transfer for all tensors of a device and type."""
    numbers, kinds = dict(row), {}
    for key, value in row.items():
        if _is_tensor(value):
            kinds.setdefault((value.device, value.dtype), []).append(key)
        elif isinstance(value, (np.generic, np.ndarray)):
            numbers[key] = value.item()
    for keys in kinds.values():
        import torch as th

        numbers.update(zip(keys, th.stack([row[key] for key in keys]).tolist()))
    return numbers
