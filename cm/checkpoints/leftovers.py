"""Removes what a save leaves that failed or was killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from cm.checkpoints import dcp
from cm.checkpoints.file_names import MANIFEST, belongs, final_name, manifest_name, parse_name, steps
from cm.io import storage
from cm.io.atomic import PARTIAL
from cm.logging import logger


def give_up(directory: str, step: int, files: Iterable[str]) -> None:
    """Leave nothing of a save that failed: what nobody can use must not fill a full disk."""
    for path in (*files, manifest_name(step) + PARTIAL):
        with contextlib.suppress(Exception):
            remove_part(storage.join(directory, path))


def remove_partial(directory: str) -> None:
    """Remove the files of a save that was killed: unfinished files, and complete ones that got no manifest.

    Files of other programs stay, whatever their names end in, and so do folders.
    """
    if storage.is_remote(directory):
        return
    complete, names = set(steps(directory)), storage.list_names(directory)
    unfinished = {
        int(match[1]) for name in names
        if (match := MANIFEST.fullmatch(final_name(name))) and is_file(os.path.join(directory, name))
    } - complete
    for name in names:
        parsed, final = parse_name(name), final_name(name)
        path = os.path.join(directory, name)
        is_left = (final != name and belongs(final)) or (parsed and parsed[1] in unfinished)
        if is_left and (is_file(path) or name.endswith(dcp.SUFFIX)):
            try:
                remove_part(path)
            except OSError as error:                        # superfluous files are no reason to end a run
                logger.warn(f"cannot remove {path}, left by an interrupted save: {error.strerror}")


def remove_part(path: str) -> None:
    """Remove a file, or a folder of shares, of a checkpoint.

    :raises OSError, UserError: if that cannot be done.
    """
    dcp.remove(path) if path.endswith(dcp.SUFFIX) else storage.remove(path)


def is_file(path: str) -> bool:
    """Whether a file or a link lies there, and no folder."""
    return os.path.islink(path) or not os.path.isdir(path)
