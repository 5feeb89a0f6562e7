"""Files of a log: lines are appended, or the file is replaced as a whole; both can be read back after a crash."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cm.errors import UserError
from cm.io import atomic, budget, storage


def append(path: Path, content: str | bytes) -> None:
    """Append a text completely or, if the disk is full, not at all. A folder that was removed is made again.

    :raises OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with open(atomic.open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash, it has either its old or its new content.

    :raises UserError: if it cannot be written.
    """
    storage.write_bytes(path, text.encode(errors="backslashreplace"))


def readable_text(path: Path) -> str:
    """The text of a file, without the zeros that a power cut can leave at its end.

    :raises FileNotFoundError: if there is none.
    :raises UserError: if it is not a file, is a link (links are not followed), or is too large.
    """
    try:
        os.close(atomic.open_own(path, os.O_RDONLY))
        return budget.read_text(path, budget.LOG).replace("\0", "")
    except (UserError, FileNotFoundError):
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a log of a run ({error}); move it away to continue without it") from None


def is_after(row: Mapping[str, Any], step: int) -> bool:
    """Whether a row has a larger `step`."""
    try:
        return float(row["step"]) > step
    except (KeyError, TypeError, ValueError):
        return False
