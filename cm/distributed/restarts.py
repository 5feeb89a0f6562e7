"""torchrun's restarts (--max-restarts): the number of the attempt, and no second attempt after an error of the user.

torchrun starts all ranks again whatever ended them. A wrong flag or a missing file would end the next attempt as well.
So the first attempt leaves a note on its machine, and later attempts of the same torchrun read it and end at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

NOTE_BYTES = 2**16


def attempt(env: Mapping[str, str] = os.environ) -> int:
    """The number of earlier attempts of torchrun; 0 under another launcher."""
    count = env.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(count) if count.isascii() and count.isdigit() else 0


def leave_note(text: str, env: Mapping[str, str] = os.environ) -> None:
    """Leave a note for later attempts of torchrun that an error of the user ended this one; never raises.

    :param text: the error.
    """
    allowed = env.get("TORCHELASTIC_MAX_RESTARTS", "")
    if not (allowed.isascii() and allowed.isdigit() and attempt(env) < int(allowed)):
        return
    with contextlib.suppress(OSError):                      # one rank is first, and that is enough
        handle = os.open(_note(env), os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
        with os.fdopen(handle, "w", errors="replace") as file:
            file.write(text[:NOTE_BYTES])


def note(env: Mapping[str, str] = os.environ) -> str | None:
    """The error of the user that ended an earlier attempt of this torchrun; None if there was none."""
    if not attempt(env):
        return None
    path = _note(env)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, errors="replace") as file:
            ours = os.fstat(file.fileno()).st_uid == os.getuid()
            return file.read(NOTE_BYTES) if ours else None
    except (OSError, AttributeError):                       # Windows knows no users
        return None


def _note(env: Mapping[str, str]) -> Path:
    """The path of the note: the same for every rank of one torchrun on this machine, different for any other."""
    try:
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    about = (env.get("TORCHELASTIC_RUN_ID", ""), str(os.getppid()), started, str(getattr(os, "getuid", int)()))
    name = hashlib.sha256("\0".join(about).encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"consistency-toolkit-{name}.mistake"
