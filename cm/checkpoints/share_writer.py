"""Checkpoints to which every rank writes its share, in the foreground or background: --checkpoint_format dcp.

In the background, a save begins with a copy of what the rank holds. Rank 0 writes the manifest after the last rank has
written its share. If the job is killed before that, the checkpoint does not exist, and the earlier ones are unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from cm.checkpoints import dcp, file_names, leftovers, manifest
from cm.checkpoints.dcp import Piece, Share
from cm.checkpoints.manager import CheckpointManager
from cm.checkpoints.manifest import Checkpoint
from cm.distributed import setup as dist
from cm.distributed.devices import background_thread
from cm.errors import UserError
from cm.io import storage

Parts = Mapping[str, Mapping[str, Piece]]
"""Part of a checkpoint ("model") -> name of a tensor -> what this rank writes of it."""


@dataclass
class Pending:
    """A save that is not complete yet."""

    checkpoint: Checkpoint
    parts: list[str]
    plain: Mapping[str, Any]                                # content of the files that rank 0 writes alone
    needed: int                                             # bytes, summed over the ranks
    shares: Future[dict[str, Share]]


class ShareWriter:
    """Writes the checkpoints of a run in shares. All ranks must call every method but `is_writing` together.

    :param in_background: train on while a checkpoint is written, except for the last one.
    """

    def __init__(self, manager: CheckpointManager, in_background: bool):
        self.manager, self.in_background = manager, in_background
        self.thread = background_thread("checkpoints", dist.dev())
        self.pending: Pending | None = None

    def save(self, checkpoint: Checkpoint, parts: Parts, plain: Mapping[str, Any], is_last: bool) -> None:
        """Start to write a checkpoint after the previous one is complete; without `in_background`, wait for its end.

        :param plain: content of the files that rank 0 writes alone; for the rest, see `CheckpointManager.save`.
        :raises UserError: for the reasons of `CheckpointManager.save`.
        """
        step = checkpoint.step
        self.finish()
        needed = sum(dist.all_gather_object(sum(p.rows.nbytes for each in parts.values() for p in each.values())))
        try:
            dist.on_main(prepare, self.manager.directory, step, list(parts), needed)
        except UserError as error:
            return self.manager.failed(step, error, is_last)
        goes_on = self.in_background and not is_last
        if goes_on:
            parts = {name: {key: kept(piece) for key, piece in each.items()} for name, each in parts.items()}
        task = self.thread.submit(write_shares, self.manager.directory, step, parts, dist.get_rank())
        self.pending = Pending(checkpoint, list(parts), copy.deepcopy(dict(plain)), needed, task)
        if not goes_on:
            self.finish(is_last)

    def is_writing(self) -> bool:
        """Whether this rank is still writing."""
        return self.pending is not None and not self.pending.shares.done()

    def finish(self, is_last: bool = False) -> None:
        """Wait until all ranks have written, then write the manifest; without an unfinished save, do nothing.

        :raises UserError: for the reasons of `CheckpointManager.save`.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        error = pending.shares.exception()
        if error is not None and not isinstance(error, UserError):
            raise error
        outcomes = dist.all_gather_object(str(error) if error else pending.shares.result())
        try:
            dist.on_main(self._complete, pending, outcomes)
        except UserError as error:
            self.manager.failed(pending.checkpoint.step, error, is_last)

    def _complete(self, pending: Pending, outcomes: list[dict[str, Share] | str]) -> None:
        """Complete the checkpoint, or remove its files if a rank has failed; on rank 0."""
        step = pending.checkpoint.step
        folders = {name: file_names.file_name(name, step, dcp.SUFFIX) for name in pending.parts}
        paths = {name: storage.join(self.manager.directory, folder) for name, folder in folders.items()}
        try:
            for outcome in outcomes:
                if isinstance(outcome, str):
                    raise UserError(outcome)
            shares = [outcome for outcome in outcomes if isinstance(outcome, dict)]
            written = {
                folders[name]: dcp.complete(path, [each[name] for each in shares]) for name, path in paths.items()
            }
        except UserError as error:
            leftovers.give_up(self.manager.directory, step, folders.values())
            raise manifest.save_failure(self.manager.directory, step, pending.needed, error) from error
        self.manager.write(pending.checkpoint, pending.plain, written)


def prepare(directory: str, step: int, parts: list[str], needed: int) -> None:
    """Make the folders of a checkpoint of so many bytes; on one rank.

    :raises UserError: if there is not enough space.
    """
    manifest.begin(directory, step, needed)
    for name in parts:
        folder = storage.join(directory, file_names.file_name(name, step, dcp.SUFFIX))
        dcp.remove(folder)                                  # of an earlier attempt, on more ranks
        storage.make_folder(folder)


def kept(piece: Piece) -> Piece:
    """A copy on the CPU, while the run changes the piece."""
    return replace(piece, rows=piece.rows.detach().to("cpu", copy=True))


def write_shares(directory: str, step: int, parts: Parts, rank: int) -> dict[str, Share]:
    """Write a rank's share of every part.

    :raises UserError: if it cannot be written.
    """
    names = {name: storage.join(directory, file_names.file_name(name, step, dcp.SUFFIX)) for name in parts}
    return {name: dcp.write_share(names[name], rank, pieces) for name, pieces in parts.items()}
