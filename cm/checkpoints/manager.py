"""The checkpoints of a run over time: which one it resumes from, which are kept, and what a failed save means."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cm.checkpoints import manifest
from cm.data.class_names import ClassNames
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import budget, storage, terminal
from cm.io.atomic import PARTIAL
from cm.logging import logger
from cm.registry import lookup

ON_SAVE_ERROR = {"stop": "end the run", "continue": "train on, and try again at the next save"}
BEST = "best.json"                                          # {"step": ...}: the checkpoint with the best evaluation


@dataclass
class CheckpointManager:
    """Finds, writes and removes the checkpoints of a run.

    :param directory: a folder, or a URL that blobfile knows.
    :param keep: how many of the newest are kept; 0 for all. So is the one that best.json in the log directory names.
    :param milestone_interval: averages of steps that are multiples of it are kept; 0 for none.
    :param on_save_error: "stop" or "continue".
    :param verify: compare the checksums of what is read with those of the manifests.
    """

    directory: str
    keep: int = 0
    milestone_interval: int = 0
    on_save_error: str = "stop"
    verify: bool = True
    origin: str = ""                                        # see `manifest.Checkpoint`
    class_names: ClassNames = ()                            # as `origin`

    def __post_init__(self) -> None:
        lookup(ON_SAVE_ERROR, self.on_save_error, "on_save_error")

    def find(self, resume: str) -> manifest.Checkpoint | None:
        """The checkpoint to resume from, on every rank; None at the start of a run.

        :param resume: "auto" for the newest of the run, "never" to refuse one, or the path of a checkpoint.
        :raises UserError: on every rank, if there is no such checkpoint, or one although `resume` is "never".
        """
        found = dist.on_main(resolve_resume, self.directory, resume, self.verify)
        self.origin = found.origin if found else ""
        return found

    def save(
        self, step: int, content: Mapping[str, Any], config: Mapping[str, Any], images_seen: int, seconds: float,
        is_last: bool, initial_weight: Mapping[str, float] | None = None,
    ) -> None:
        """Write a checkpoint on rank 0; a failure is raised on every rank. To be called on all ranks.

        :param seconds: that the run has trained so far.
        :param initial_weight: see `manifest.Checkpoint`.
        :param is_last: whether it is the last save of the run: then a failure is an error whatever `on_save_error` is.
        :raises UserError: if it cannot be written and the run must not continue without it.
        """
        try:
            dist.on_main(self.write, step, content, config, images_seen, seconds, initial_weight)
        except UserError as error:
            if is_last or self.on_save_error == "stop":
                raise
            logger.warn(f"training continues without a checkpoint of step {step}: {error}")

    def write(
        self, step: int, content: Mapping, config: Mapping, images_seen: int, seconds: float,
        initial_weight: Mapping[str, float] | None = None,
    ) -> None:
        """As `save`, on rank 0 only; old checkpoints are removed afterwards.

        :raises UserError: if it cannot be written.
        """
        saved = manifest.save(
            self.directory, step, content, config, images_seen, seconds, self.origin, self.class_names,
            initial_weight,
        )
        size = terminal.size_text(sum(facts["size"] for facts in saved.files.values()))
        names = ", ".join(saved.names())
        logger.log(f"saved step {step} in {terminal.printable(self.directory)}: {names} ({size})")
        if self.keep:
            try:                                            # superfluous files are no reason to end a run
                _prune(self.directory, self.keep, self.milestone_interval, {step, _best_step(logger.get_dir())})
            except Exception as error:
                logger.warn(f"cannot remove old checkpoints in {self.directory}: {type(error).__name__}: {error}")


def resolve_resume(
    directory: str, resume: str, verify: bool = True, looks_only: bool = False
) -> manifest.Checkpoint | None:
    """The checkpoint that a run in `directory` resumes from, if any; for one rank.

    :param resume: see `CheckpointManager.find`.
    :param verify: see `CheckpointManager`.
    :param looks_only: leave every file as it is.
    :raises UserError: as `CheckpointManager.find`.
    """
    if not looks_only:
        manifest.remove_partial(directory)
    own = manifest.newest(directory, verify)
    if own and resume == "never":
        raise UserError(
            f"{directory} already holds a checkpoint of step {own.step}, and --resume never was given: "
            "choose another --log_dir, or --resume auto to resume"
        )
    path = storage.absolute(resume)
    if resume in ("auto", "never") or path == storage.absolute(directory):
        if own is None and resume != "never" and manifest.steps(directory):
            raise UserError(
                f"{directory} holds checkpoints, but none that a run can resume from (the warnings above say what is "
                "wrong with each): restore one from a copy, choose another --log_dir, or start again here with "
                "--resume never"
            )
        return own
    if own and own.origin == path:                          # the same command again
        return own
    asked = manifest.find(resume, verify)
    if own and storage.absolute(asked.directory) != storage.absolute(directory):
        raise UserError(
            f"--resume {resume}: {directory} holds a run of its own, at step {own.step}, that did not start from "
            "it; choose another --log_dir, or --resume auto to resume that run"
        )
    if not looks_only:
        archive_after(directory, asked.step)
    return replace(asked, origin=path)


def archive_after(directory: str, step: int) -> None:
    """Rename the checkpoints after `step`, which are no longer part of the run, to names ending in .aside."""
    for later in manifest.steps(directory):
        if later > step:
            path = storage.join(directory, manifest.manifest_name(later))
            storage.rename(path, path + ".aside")
            logger.log(f"going back to step {step}: {path} is now {path}.aside")


def _prune(directory: str, keep: int, milestone_interval: int, spared: Collection[int | None]) -> None:
    """Remove all but the newest `keep` checkpoints and the averages of milestones.

    A manifest is changed or removed before its files are, so that a checkpoint is complete or absent if the process is
    killed in between.
    """
    for step in manifest.steps(directory)[:-keep]:
        if step in spared:
            continue
        try:
            checkpoint = manifest.read(storage.join(directory, manifest.manifest_name(step)))
        except UserError as error:
            logger.warn(f"the files of step {step} stay, whatever --keep_checkpoints says: {error}")
            continue
        is_milestone = milestone_interval > 0 and step % milestone_interval == 0
        kept = {file: facts for file, facts in checkpoint.files.items() if is_milestone and file.startswith("ema_")}
        if kept == checkpoint.files:
            continue
        going = checkpoint.manifest + PARTIAL       # which `manifest.remove_partial` recognizes
        if kept:
            replace(checkpoint, files=kept).write_manifest()
        else:
            storage.rename(checkpoint.manifest, going)
        for file in checkpoint.files.keys() - kept.keys():
            parsed = manifest.parse_name(file)
            if parsed and parsed[1] == step:    # a manifest that was written by others may list any file
                storage.remove(storage.join(directory, file))
        storage.remove(going)


def _best_step(log_dir: str) -> int | None:
    """The step that best.json names; None without that file."""
    path = os.path.join(log_dir, BEST)
    if not os.path.exists(path):
        return None
    return int(budget.read_json(path, budget.SETTINGS)["step"])
