"""A lock on a run's folder: a second job is refused while the first one runs."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from typing import IO

from cm.errors import UserError
from cm.io import atomic, terminal
from cm.logging import logger

NAME = ".lock"
PATIENCE_S = 3.0
"""Time that the processes of a job that was just killed may take to end."""

_held: dict[str, IO[str]] = {}


def take(directory: str) -> None:
    """Lock a folder, created if necessary, until this process ends; on one rank.

    It is a record lock of the kernel (fcntl): it disappears with a killed process, loader processes do not inherit it,
    and NFS applies it to other machines. On a file system without locks there is only a warning.

    :raises UserError: if another process has the lock, or the folder cannot be made or written.
    """
    directory = os.path.realpath(directory)
    if directory in _held:
        return
    try:
        os.makedirs(directory, exist_ok=True)
        handle = atomic.open_own(os.path.join(directory, NAME), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        raise UserError(
            f"cannot write to {terminal.printable(directory)}: {error.strerror}; choose another --log_dir, a folder "
            "that can be created and written to"
        ) from None
    file = os.fdopen(handle, "a+")                          # held open: closing it would give up the lock
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UserError(
                    f"{directory} is in use by {owner}: wait for it to end, or choose another --log_dir"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            logger.warn(f"{directory} cannot be locked ({error}): make sure that no second job uses it")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[directory] = file
