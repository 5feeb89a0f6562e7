"""A local file that appears under its name only when it is complete, or not at all.

The data go to a temporary file in the same folder, which replaces the final one in a single step. Temporary names are
random, so two writers of one path never share one, and have a form of their own, so what a killed process leaves can be
recognized and removed without touching the files of other programs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from types import TracebackType
from typing import BinaryIO, cast

from cm.errors import UserError

PARTIAL = ".partial"
"""Suffix of files that are not complete yet."""
TEMPORARY = re.compile(rf"\.(.+)\.cm-[0-9a-f]{{12}}{re.escape(PARTIAL)}", re.DOTALL)
LONGEST_NAME = 200                                          # bytes of a name in its temporary one; 255 are the limit
ABANDONED_S = 3600
FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

FREE_SPACE = "Free some space, or choose another folder"
WRITABLE = "Make the folder writable, or choose another one"
REMEDIES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
    errno.EROFS: WRITABLE,
    errno.ENOENT: "Create the folder, or choose another one",
}
OTHER_REMEDY = "If the disk is full, free some space; if not, look at the folder, or choose another one"


class AtomicFile:
    """A binary file, `file`, that appears under `path` on `commit`; used as a context, it commits if nothing is raised.

    A pipe or a device, such as /dev/stdout, cannot be replaced and is written directly.

    :param durable: wait until the file and its folder are on the disk, so that it survives a power cut. Only the files
        of a large set that is checked when it is read again should do without.
    :raises UserError: if the file cannot be written; what stood under `path` stays.
    """

    def __init__(self, path: str | os.PathLike[str], durable: bool = True):
        self.path, self.durable = os.fspath(path), durable
        self.temporary = None if is_stream(self.path) else temporary_path(self.path)
        try:
            handle = os.open(self.temporary, FLAGS, 0o666) if self.temporary else os.open(self.path, os.O_WRONLY)
            self.file = cast(BinaryIO, os.fdopen(handle, "w+b" if self.temporary else "wb"))
        except OSError as error:
            raise write_failure(self.path, error) from error

    def commit(self) -> None:
        """Let the file appear; call it once.

        :raises UserError: if that cannot be done; nothing is left behind.
        """
        try:
            self.file.flush()
            if self.durable and self.temporary:
                os.fsync(self.file.fileno())
            self.file.close()
            if self.temporary:
                os.replace(self.temporary, self.path)
                self.temporary = None
                if self.durable:
                    sync_directory(os.path.dirname(os.path.abspath(self.path)))
        except OSError as error:
            self.discard()
            raise write_failure(self.path, error) from error

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):                  # what is still buffered may not fit on the disk either
            self.file.close()
        if self.temporary:
            with contextlib.suppress(OSError):
                os.remove(self.temporary)

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            return self.commit()
        self.discard()
        if isinstance(error, (OSError, RuntimeError)):      # torch.save reports a full disk as a RuntimeError
            raise write_failure(self.path, error) from error


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """The descriptor of a file of a fixed name in a run's folder, for what cannot be replaced: a log, a lock.

    Whoever may write to the folder could lead such a name to another file, which would then be read or changed.

    :param flags: of os.open.
    :raises OSError: if it cannot be opened, or is a link or otherwise no regular file; nothing was read or changed.
    """
    name = os.path.basename(path)
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)     # a pipe would wait
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, f"{name} is a symbolic link, which is not followed: remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, f"{name} is no regular file: remove it")
    return handle


def is_stream(path: str) -> bool:
    """Whether the path is a pipe, a socket or a device."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def temporary_path(path: str) -> str:
    """A new hidden name in the folder of `path`; `written_for` finds the final name from it."""
    folder, name = os.path.split(path)
    short = os.fsdecode(os.fsencode(name)[:LONGEST_NAME])
    return os.path.join(folder, f".{short}.cm-{secrets.token_hex(6)}{PARTIAL}")


def written_for(name: str) -> str | None:
    """'.model000010.pt.cm-0123456789ab.partial' -> 'model000010.pt'; None for a name of another form."""
    match = TEMPORARY.fullmatch(name)
    return match[1] if match else None


def remove_temporaries(path: str | os.PathLike[str]) -> None:
    """Remove the files and folders that killed writers of `path` have left; no other process may be writing it now."""
    folder, name = os.path.split(os.path.abspath(path))
    for found in os.listdir(folder) if os.path.isdir(folder) else []:
        if written_for(found) == name:
            remove_tree(os.path.join(folder, found))


def remove_old_temporaries(folder: str | os.PathLike[str]) -> None:
    """Remove what killed writers have left in a folder into which other processes may be writing.

    What was changed within the last `ABANDONED_S` seconds stays.
    """
    for found in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, found)
        with contextlib.suppress(OSError):
            if written_for(found) and time.time() - os.lstat(path).st_mtime > ABANDONED_S:
                remove_tree(path)


def remove_tree(path: str) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as that is possible."""
    if os.path.isdir(path) and not os.path.islink(path):
        return shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.remove(path)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Make a rename in a folder survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Wait until all files and folders in a folder, and itself, are on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(parent)


def free_bytes(directory: str) -> int | None:
    """The free bytes on the disk of a local folder; None if they cannot be found out."""
    try:
        space = os.statvfs(os.path.abspath(directory))
    except OSError:
        return None
    return space.f_bavail * space.f_frsize


def write_failure(path: str | os.PathLike[str], error: Exception) -> UserError:
    """The one message about a file that cannot be written: its path, why, the space that is free, and the remedy."""
    folder = os.path.dirname(os.path.abspath(path))
    if isinstance(error, FileNotFoundError) and os.path.isdir(folder):
        return UserError(f"cannot write {os.fspath(path)}: what was written so far is gone; another command that "
                         "writes to the same place may have removed it. Wait for that one, or choose another place")
    free = free_bytes(folder)
    space = "" if free is None else f". {free / 2**20:.1f} MiB are free in {folder}"
    number = error.errno if isinstance(error, OSError) else None
    reason = str(error).partition("\n")[0] if number is None else os.strerror(number)
    return UserError(f"cannot write {os.fspath(path)}: {reason}{space}. {REMEDIES.get(number or 0, OTHER_REMEDY)}")
