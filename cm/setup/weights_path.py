"""Which file of weights a path means: a URL, the folder of a run, or the file itself."""

from __future__ import annotations

import os

from cm.checkpoints.averages import newest_weights
from cm.checkpoints.file_names import parse_name
from cm.checkpoints.loading import format_of
from cm.config.flags import Settings
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import budget, storage, untrusted, web
from cm.logging import logger


def find_weights(settings: Settings, flag: str) -> str:
    """The file that a flag stands for, downloaded if it is an address; the flag then names it. On every rank.

    What a folder stands for is said. An address stays one in a dry run, which fetches nothing.

    :raises UserError: on every rank, for an address that cannot be had, and a folder without weights.
    """
    if settings.dry_run and web.is_address(settings.values[flag]):
        return settings.values[flag]
    fetch_inputs(settings, flag)
    asked = settings.values[flag]
    path = dist.on_main(weights_in, asked, flag, settings.values.get("verify_weights", True))
    if path != asked:
        logger.log(f"--{flag} {asked}: using {path}")
        settings.replace(**{flag: path})
    return path


def fetch_inputs(settings: Settings, *flags: str) -> None:
    """Download the files whose addresses these flags give; the flags then name the copies. On every rank.

    :raises UserError: on every rank, if one cannot be had.
    """
    for flag in flags:
        if not settings.dry_run and web.is_address(settings.values.get(flag) or ""):
            dist.on_main(web.local_copy, settings.values[flag], logger.log)         # the others find it, or wait
            settings.replace(**{flag: web.local_copy(settings.values[flag], logger.log)})


def weights_in(path: str, flag: str, verify: bool = True) -> str:
    """The file that a run's folder stands for: its best average, else the newest, or the newest model where the
    average still holds much of the initial weights; any other path as it is. One rank.

    A --log_dir stands for the checkpoints that its run has in a local --checkpoint_dir. An object store has no names of
    folders, so a name with an ending is a file there.

    :param verify: see `newest_weights`.
    :raises UserError: for a folder without weights.
    """
    is_file = parse_name(path.rstrip("/")) or storage.is_remote(path) and os.path.splitext(path.rstrip("/"))[1]
    if is_file or format_of(path) or not storage.is_directory(path):
        return path.rstrip("/") if parse_name(path.rstrip("/")) else path
    best = os.path.join(path, "best.json")
    if os.path.exists(best):
        name = _file_of_best(best)
        if name and not untrusted.escapes(name) and os.path.exists(os.path.join(path, name)):
            return os.path.join(path, name)
    elsewhere = _checkpoint_dir(path)
    found = newest_weights(path, verify)
    if found is None and elsewhere and not storage.is_remote(elsewhere) and os.path.isdir(elsewhere):
        found = newest_weights(elsewhere, verify)
    if found is None:
        hint = f"; the run wrote its checkpoints to {elsewhere}" if elsewhere else ""
        raise UserError(f"--{flag} {path} is a folder without a complete checkpoint (checkpoint_*.json) and without "
                        f"best.json: give a file of weights such as ema_0.9999_600000.pt{hint}")
    return found


def _checkpoint_dir(folder: str) -> str:
    """The folder of the checkpoints of a run according to its config.json; empty if it does not say."""
    path = os.path.join(folder, "config.json")
    if storage.is_remote(folder) or not os.path.exists(path):
        return ""
    try:
        return str(dict(budget.read_json(path, budget.SETTINGS)).get("checkpoint_dir") or "")
    except (UserError, OSError, ValueError, TypeError):
        return ""


def _file_of_best(path: str) -> str:
    """What best.json calls the file with the best average; empty if it names none.

    :raises UserError: if it is damaged.
    """
    try:
        return str(dict(budget.read_json(path, budget.SETTINGS)).get("file", ""))
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a file of weights such as ema_0.9999_600000.pt instead "
                        "of the folder") from None
