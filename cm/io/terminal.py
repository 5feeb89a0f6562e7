"""The terminal: streams that may be closed at any time, and text that must not contain control sequences.

A job outlives its readers: the reader of a pipe ends (`| head`), a terminal is closed, a launcher starts the
process without stderr. `guard` makes such a stream silent; log files and checkpoints are written as before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

from cm.errors import UserError

_stdout_is_data = False


def keep_stdout_for_data(is_data: bool) -> None:
    """Say whether stdout carries a result for other programs, such as the JSON of --dry_run; text then is on stderr."""
    global _stdout_is_data
    _stdout_is_data = is_data
    if is_data:
        demand_stdout()


def demand_stdout() -> None:
    """Treat stdout as a result from now on: it is an error if it cannot be written."""
    if isinstance(sys.stdout, LastingStream):
        sys.stdout.lossy = False


def text_stream() -> Any:
    """The stream for messages; None if it is closed."""
    return sys.stderr if _stdout_is_data else sys.stdout


GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)
"""Errors of a stream that nobody will read again."""


class LastingStream:
    """A text stream that becomes silent when its reader is gone. Everything else is passed to the stream.

    Where text cannot be written for another reason, such as a full disk, it is the result of a command that is lost.

    :param stream: what is written to.
    :param lossy: whether text is dropped then, too; else a UserError is raised.
    """

    def __init__(self, stream: Any, lossy: bool = False):
        self.stream, self.lossy = stream, lossy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, if anybody can read it."""
        with self._outlived():
            self.stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts, if anybody can read them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write out what is held back, if anybody can read it."""
        with self._outlived():
            self.stream.flush()

    @contextlib.contextmanager
    def _outlived(self) -> Any:
        """Go on after an error of the stream; one that is gone leads to /dev/null from now on."""
        try:
            yield
        except OSError as error:
            if error.errno in GONE:
                self._silence()
            elif not self.lossy:
                self._silence()                             # what is held back would fail again at the end
                name = str(getattr(self.stream, "name", "a stream")).strip("<>")
                raise UserError(f"{name} cannot be written: {error.strerror or error}") from None
        except ValueError:                                  # closed by this program itself
            if not self.stream.closed:
                raise

    def _silence(self) -> None:
        """Lead the descriptor to /dev/null, so that the C library and the interpreter's end are silent too."""
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)


def guard(lossy: bool = False) -> None:
    """Let this program outlive its stdout and stderr; to be called first of all, and again with no effect.

    A descriptor that is closed at the start is opened on /dev/null: otherwise the next file, perhaps a checkpoint,
    would get its number, and with it whatever a library prints.

    :param lossy: see `LastingStream`; for runs whose results are files. No result is on stderr.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)         # the lowest number that is free: this one
            os.set_inheritable(opened, True)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, LastingStream):
            stream.lossy |= lossy
            continue
        if stream is None:
            stream = open(descriptor, "w", closefd=False)  # noqa: SIM115 (as long as the program)
        if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")   # a file's name may hold what this terminal cannot show
        setattr(sys, name, LastingStream(stream, lossy or name == "stderr"))


def size_text(size: int) -> str:
    """A number of bytes for people.

    >>> size_text(1536), size_text(5)
    ('1.5 KiB', '5 B')
    """
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value /= 1024 if unit != "TiB" else 1
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def printable(text: str) -> str:
    """A text in one line that any terminal shows as it is: control characters and undecodable bytes as escapes.

    >>> printable("a\\x1b[31m\\n")
    'a\\\\x1b[31m\\\\n'
    """
    return "".join(_escaped(character) if not character.isprintable() else character for character in text)


def without_controls(text: str) -> str:
    """`printable` that keeps line breaks and tabs, for text of several lines that may quote the name of a file."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else _escaped(character) for character in text
    )


def _escaped(character: str) -> str:
    """'\\x1b' -> '\\\\x1b'; a byte that could not be decoded as that byte."""
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:                          # Python's stand-in for byte number - 0xDC00
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
