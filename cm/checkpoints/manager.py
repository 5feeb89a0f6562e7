"""The checkpoints of a run over time: which one it resumes from, which are kept, and what happens when a save fails."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cm.checkpoints import file_names, leftovers, manifest
from cm.data.class_names import ClassNames
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import budget, storage, terminal
from cm.io.atomic import PARTIAL
from cm.logging import logger
from cm.registry import lookup

ON_SAVE_ERROR = {"stop": "end the run", "continue": "train on, and try again at the next save"}
CONFIG = "config.json"                                      # flags of the run, next to its log
BEST = "best.json"                                          # {"step": ...}: the checkpoint with the best evaluation
KEEP = 3                                                    # default number of newest checkpoints of a new run


@dataclass
class CheckpointManager:
    """Finds, writes and removes the checkpoints of a run.

    :param directory: a folder, or a URL that blobfile knows.
    :param keep: number of newest checkpoints to keep; 0: all; None: as many as before in a resumed run, `KEEP` in a new
        one. The checkpoint that best.json in the log directory names is kept as well. Checkpoints of other runs are
        never removed.
    :param milestone_interval: averages of steps that are multiples of it are always kept; 0: none.
    :param on_save_error: "stop" or "continue".
    :param verify: compare the checksums of what is read with those of the manifests.
    """

    directory: str
    keep: int | None = 0
    milestone_interval: int = 0
    on_save_error: str = "stop"
    verify: bool = True
    origin: str = ""                                        # see `manifest.Checkpoint`
    class_names: ClassNames = ()                            # as `origin`
    run: str = ""                                           # as `origin`

    def __post_init__(self) -> None:
        lookup(ON_SAVE_ERROR, self.on_save_error, "on_save_error")
        self._runs: dict[int, str | None] = {}              # of the steps that are known; None if that is not known

    def find(self, resume: str) -> manifest.Checkpoint | None:
        """The checkpoint to resume from, on every rank; None at the start of a run.

        :param resume: "auto" for the newest of the run, "never" to refuse one, or the path of a checkpoint.
        :raises UserError: on every rank, if there is no such checkpoint, or if there is one and `resume` is "never".
        """
        found = dist.on_main(resolve_resume, self.directory, resume, self.verify)
        if found is None:
            dist.on_main(_refuse_left_run, self.directory, logger.get_dir())
        self.origin = found.origin if found else ""
        goes_on = found is not None and storage.absolute(found.directory) == storage.absolute(self.directory)
        self.run = found.run if found and goes_on else secrets.token_hex(8)
        if self.keep is None:
            self.keep = KEEP if found is None else _kept_before(found)
        return found

    def checkpoint(
        self, step: int, images_seen: int, config: Mapping[str, Any], seconds: float = 0.0,
        initial_weight: Mapping[str, float] | None = None,
    ) -> manifest.Checkpoint:
        """A checkpoint of this run that is still to be written; see `manifest.Checkpoint`."""
        return manifest.Checkpoint(
            self.directory, step, images_seen, dict(config), seconds=seconds, origin=self.origin,
            class_names=self.class_names, initial_weight=dict(initial_weight or {}), run=self.run,
        )

    def save(self, checkpoint: manifest.Checkpoint, content: Mapping[str, Any], is_last: bool) -> None:
        """Write a checkpoint on rank 0; a failure is raised on every rank. Call it on all ranks.

        :param checkpoint: the result of the method `checkpoint`.
        :param content: see `manifest.write`.
        :param is_last: whether it is the last save of the run; then a failure is always an error.
        :raises UserError: if it cannot be written and the run must not continue without it, see `on_save_error`.
        """
        try:
            dist.on_main(self.write, checkpoint, content)
        except UserError as error:
            self.failed(checkpoint.step, error, is_last)

    def failed(self, step: int, error: UserError, is_last: bool) -> None:
        """Handle a failed save: warn or raise, as `on_save_error` says.

        :raises UserError: if the run must not continue without it.
        """
        if is_last or self.on_save_error == "stop":
            raise error
        logger.warn(f"training continues without a checkpoint of step {step}: {error}")

    def write(
        self, checkpoint: manifest.Checkpoint, content: Mapping[str, Any],
        written: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """Write a checkpoint, then remove old ones; call it on rank 0 only.

        :param written: see `manifest.write`.
        :raises UserError: if it cannot be written.
        """
        saved, step = manifest.write(checkpoint, content, written), checkpoint.step
        self._runs[step] = self.run
        size = terminal.size_text(sum(facts["size"] for facts in saved.files.values()))
        names = ", ".join(saved.names())
        logger.log(f"saved step {step} in {terminal.printable(self.directory)}: {names} ({size})")
        if self.keep:
            try:                                            # a run need not end because of superfluous files
                spared = {step, _best_step(logger.get_dir())}
                for old in self._own_steps()[: -self.keep]:
                    if old not in spared:
                        _thin(self.directory, old, self.milestone_interval)
            except Exception as error:
                logger.warn(f"cannot remove old checkpoints in {self.directory}: {type(error).__name__}: {error}")

    def _own_steps(self) -> list[int]:
        """The steps that this run has saved, ascending. The folder may also contain steps of other runs."""
        found = file_names.steps(self.directory)
        for step in found:
            if step not in self._runs:
                try:
                    path = storage.join(self.directory, file_names.manifest_name(step))
                    self._runs[step] = manifest.read(path).run
                except UserError as error:
                    logger.warn(f"the files of step {step} are kept, despite --keep_checkpoints: {error}")
                    self._runs[step] = None
        return [step for step in found if self._runs[step] == self.run]


def resolve_resume(
    directory: str, resume: str, verify: bool = True, looks_only: bool = False
) -> manifest.Checkpoint | None:
    """The checkpoint that a run in `directory` resumes from, if any; for one rank.

    :param resume: see `CheckpointManager.find`.
    :param verify: see `CheckpointManager`.
    :param looks_only: change no file.
    :raises UserError: for the reasons of `CheckpointManager.find`.
    """
    if not looks_only:
        leftovers.remove_partial(directory)
    own = manifest.newest(directory, verify)
    if own and resume == "never":
        raise UserError(
            f"{directory} already holds a checkpoint of step {own.step}, and --resume never was given: "
            "choose another --log_dir, or --resume auto to resume"
        )
    path = storage.absolute(resume)
    if resume in ("auto", "never") or path == storage.absolute(directory):
        if own is None and resume != "never" and file_names.steps(directory):
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


def _refuse_left_run(directory: str, log_dir: str) -> None:
    """Refuse to start a new run in the log directory of a run that has its checkpoints in another folder.

    Otherwise a forgotten --checkpoint_dir would restart such a run from step 0.

    :raises UserError: naming that folder.
    """
    try:
        config = budget.read_json(os.path.join(log_dir, CONFIG), budget.SETTINGS)
        before = str(config.get("checkpoint_dir") or log_dir)
        is_left = storage.absolute(before) != storage.absolute(directory) and bool(file_names.steps(before))
    except (OSError, UserError, ValueError, AttributeError):
        return                                              # no run, or none that can be read
    if is_left:
        flag = "no --checkpoint_dir" if storage.absolute(before) == storage.absolute(log_dir) else (
            f"--checkpoint_dir {before}")
        raise UserError(f"the run in {log_dir} keeps its checkpoints in {before}, and {directory} holds none: give "
                        f"{flag} to resume it, --resume {before} to continue with a copy of it, or another --log_dir "
                        "for a new run")


def archive_after(directory: str, step: int) -> None:
    """Rename the checkpoints after `step`, which are no longer part of the run, to names ending in .aside."""
    for later in file_names.steps(directory):
        if later > step:
            path = storage.join(directory, file_names.manifest_name(later))
            storage.rename(path, path + ".aside")
            logger.log(f"going back to step {step}: {path} is now {path}.aside")


def _kept_before(found: manifest.Checkpoint) -> int:
    """The number of checkpoints that the run has kept so far; 0 (all, the former default) in older manifests."""
    keep = found.config.get("keep_checkpoints", 0)
    return keep if type(keep) is int and keep >= 0 else 0


def _thin(directory: str, step: int, milestone_interval: int) -> None:
    """Remove a checkpoint; of a milestone, keep the averages. Calling it again changes nothing.

    A manifest is changed or removed before its files are, so that a checkpoint is complete or absent if the process is
    killed in between.

    :raises UserError: if its manifest cannot be read.
    """
    checkpoint = manifest.read(storage.join(directory, file_names.manifest_name(step)))
    if not checkpoint.can_resume():
        return
    is_milestone = milestone_interval > 0 and step % milestone_interval == 0
    kept = {file: facts for file, facts in checkpoint.files.items() if is_milestone and file.startswith("ema_")}
    going = checkpoint.manifest + PARTIAL           # a name that `leftovers.remove_partial` recognizes
    if kept:
        replace(checkpoint, files=kept).write_manifest()
    else:
        storage.rename(checkpoint.manifest, going)
    for file in checkpoint.files.keys() - kept.keys():
        parsed = file_names.parse_name(file)
        if parsed and parsed[1] == step:            # a manifest from elsewhere may list any file
            leftovers.remove_part(storage.join(directory, file))
    storage.remove(going)


def _best_step(log_dir: str) -> int | None:
    """The step that best.json names; None without that file."""
    path = os.path.join(log_dir, BEST)
    if not os.path.exists(path):
        return None
    return int(budget.read_json(path, budget.SETTINGS)["step"])
