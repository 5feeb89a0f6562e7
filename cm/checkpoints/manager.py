"""The checkpoints of a run over its life: which one it goes on from, which ones stay, and what a failed save means."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cm.checkpoints import manifest
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage
from cm.io.atomic import PARTIAL
from cm.logging import logger
from cm.registry import lookup

ON_SAVE_ERROR = {"stop": "end the run", "continue": "train on, and try again at the next save"}
BEST = "best.json"                                          # {"step": ...}: the checkpoint an evaluation liked best


@dataclass
class CheckpointManager:
    """Where a run's checkpoints are.

    :param directory: a folder, or a URL that blobfile knows.
    :param keep: how many of the newest stay; 0 for all. The one that best.json in the log directory names stays too.
    :param milestone_interval: averages of steps that are multiples of it stay; 0 for none.
    :param on_save_error: "stop" or "continue".
    """

    directory: str
    keep: int = 0
    milestone_interval: int = 0
    on_save_error: str = "stop"
    origin: str = ""                                        # see state.Checkpoint

    def __post_init__(self) -> None:
        lookup(ON_SAVE_ERROR, self.on_save_error, "on_save_error")

    def find(self, resume: str) -> manifest.Checkpoint | None:
        """What to go on from, on every rank; None at the start of a run.

        :param resume: "auto" for the newest of the run, "never" to refuse one, or the path of a checkpoint.
        :raises UserError: on every rank, if there is no such checkpoint, or one that was to be refused.
        """
        found = dist.on_main(resolve_resume, self.directory, resume)
        self.origin = found.origin if found else ""
        return found

    def save(
        self, step: int, content: Mapping[str, Any], config: Mapping[str, Any], images_seen: int, seconds: float,
        is_last: bool,
    ) -> None:
        """Write a checkpoint on rank 0; every rank hears of a failure.

        :param is_last: nothing comes after it, so a failure is one whatever `on_save_error` says.
        :raises UserError: if it cannot be written and the run is not to go on without it.
        """
        try:
            dist.on_main(self.write, step, content, config, images_seen, seconds)
        except UserError as error:
            if is_last or self.on_save_error == "stop":
                raise
            logger.warn(f"training goes on without a checkpoint of step {step}: {error}")

    def write(self, step: int, content: Mapping, config: Mapping, images_seen: int, seconds: float) -> None:
        manifest.save(self.directory, step, content, config, images_seen, seconds, self.origin)
        if self.keep:
            try:                                            # more files than need be are no reason to end a run
                prune(self.directory, self.keep, self.milestone_interval, {step, best_step(logger.get_dir())})
            except Exception as error:
                logger.warn(f"old checkpoints in {self.directory} stay: {type(error).__name__}: {error}")


def resolve_resume(directory: str, resume: str) -> manifest.Checkpoint | None:
    """What a run in `directory` goes on from; for one rank."""
    manifest.remove_partial(directory)
    own = manifest.newest(directory)
    if own and resume == "never":
        raise UserError(
            f"{directory} already holds a checkpoint of step {own.step}, and --resume never was given: "
            "choose another --log_dir, or --resume auto to go on"
        )
    path = storage.absolute(resume)
    if resume in ("auto", "never") or path == storage.absolute(directory):
        if own is None and resume != "never" and manifest.steps(directory):
            raise UserError(
                f"{directory} holds checkpoints, but none that a run can go on from (what is wrong with each is said "
                "above): bring one back from a copy, choose another --log_dir, or begin anew here with --resume never"
            )
        return own
    if own and own.origin == path:                          # the same command once more
        return own
    asked = manifest.find(resume)
    if own and storage.absolute(asked.directory) != storage.absolute(directory):
        raise UserError(
            f"--resume {resume}: {directory} holds a run of its own, at step {own.step}, that did not begin there; "
            "choose another --log_dir, or --resume auto to go on with that run"
        )
    archive(directory, asked.step)
    return replace(asked, origin=path)


def archive(directory: str, step: int) -> None:
    """Later checkpoints belong to a future that will not come; they are renamed, not removed."""
    for later in manifest.steps(directory):
        if later > step:
            path = storage.join(directory, manifest.manifest_name(later))
            storage.rename(path, path + ".aside")
            logger.log(f"going back to step {step}: {path} is now {path}.aside")


def prune(directory: str, keep: int, milestone_interval: int, spared: Collection[int | None]) -> None:
    """Remove all but the newest `keep` checkpoints and the averages of milestones.

    A manifest changes or goes before its files do, so that what a kill leaves is either whole or nothing.
    """
    for step in manifest.steps(directory)[:-keep]:
        if step in spared:
            continue
        checkpoint = manifest.read(storage.join(directory, manifest.manifest_name(step)))
        is_milestone = milestone_interval > 0 and step % milestone_interval == 0
        kept = {file: facts for file, facts in checkpoint.files.items() if is_milestone and file.startswith("ema_")}
        if kept == checkpoint.files:
            continue
        going = checkpoint.manifest + PARTIAL       # which `remove_partial` understands
        if kept:
            replace(checkpoint, files=kept).write_manifest()
        else:
            storage.rename(checkpoint.manifest, going)
        for file in checkpoint.files.keys() - kept.keys():
            storage.remove(storage.join(directory, file))
        storage.remove(going)


def best_step(log_dir: str) -> int | None:
    path = os.path.join(log_dir, BEST)
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return int(json.load(file)["step"])
