"""Removes the files of a save that failed or was killed."""

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
    """Remove the files of a save that failed, so that they do not fill the disk."""
    for path in (*files, manifest_name(step) + PARTIAL):
        with contextlib.suppress(Exception):
            remove_part(storage.join(directory, path))


def remove_partial(directory: str) -> None:
    """Remove the files of a save that was killed: unfinished files, and complete ones without a manifest.

    Files of other programs and other folders are kept, whatever their names are.
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
            except OSError as error:                        # a run need not end because of superfluous files
                logger.warn(f"cannot remove {path}, left by an interrupted save: {error.strerror}")


def remove_part(path: str) -> None:
    """Remove a file of a checkpoint, or a folder to which all ranks have written.

    :raises OSError, UserError: if it cannot be removed.
    """
    dcp.remove(path) if path.endswith(dcp.SUFFIX) else storage.remove(path)


def is_file(path: str) -> bool:
    """Whether the path is a file or a link, not a folder."""
    return os.path.islink(path) or not os.path.isdir(path)
