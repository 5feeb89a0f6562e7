"""The state of a training loop in a checkpoint: how it is collected, and how a loop restores it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch as th
from torch import Tensor

from cm.checkpoints import averages, dcp, loading, manifest
from cm.checkpoints.dcp import Piece
from cm.checkpoints.manager import CheckpointManager
from cm.checkpoints.share_writer import ShareWriter
from cm.data import latents
from cm.data.class_names import require_same
from cm.data.latents import RECORD
from cm.distributed import setup as dist
from cm.distributed.sharding import Sharding
from cm.errors import UserError
from cm.io import storage
from cm.logging import logger
from cm.objectives.base import ONLINE, Objective
from cm.training import pieces
from cm.training.config import LoopConfig
from cm.training.ema import EMA
from cm.training.ema_rates import EmaRate
from cm.training.master_weights import MasterWeights
from cm.training.optimizer import read
from cm.training.run_networks import RunNetworks
from cm.training.trained_network import TrainedNetwork
from cm.types import Callback

STATUS = "status.json"
GROUPS = "param_groups"                                     # key of the optimizers' groups, if their state is a folder


class TrainingRun(Protocol):
    """The parts of a training loop that are saved and restored; `cm.training.loop.TrainLoop` has them.

    :ivar ema_rate: the rate of each average.
    :ivar averages_began: number of images seen when the averages last started; None if they start at the next step.
    :ivar seconds_before: seconds of training before this start.
    """

    config: LoopConfig
    objective: Objective
    callbacks: Sequence[Callback]
    checkpoints: CheckpointManager
    writer: ShareWriter | None
    flags: dict[str, Any]
    nets: RunNetworks
    averages: EMA
    ema_rate: list[EmaRate]
    averages_began: int | None
    step: int
    images_seen: int
    seconds_before: float
    total_training_steps: int

    def sharding(self, sizes: list[int]) -> Sharding:
        """Which rank writes which of the tensors with these numbers of elements."""
        ...

    def elapsed_seconds(self) -> float:
        """Seconds of training so far, over all starts of the run."""
        ...


def state_dict(loop: TrainingRun) -> dict[str, Any]:
    """Name of a part -> its state dict, on rank 0; empty on the others. All ranks must call it together.

    The step, the images seen, the seconds trained and the flags are in the manifest. No random state is saved: all
    random numbers are functions of the seed and of the position or the step.
    """
    trainer = loop.nets.trainer
    gathered = {f"ema_{rate}": loop.averages.gather_to_main(rate.name) for rate in loop.ema_rate}
    optimizers = {file_of(role): network.opt.state_dict() for role, network in loop.nets.trained.items()}
    owners = loop.nets.saved
    masters = {name: owner.gather_to_main() for name, owner in owners.items()}
    if not dist.is_main():
        return {}
    return {
        **{name: owner.master_params_to_state_dict(masters[name]) for name, owner in owners.items()},
        **{name: trainer.master_params_to_state_dict(params) for name, params in gathered.items()},
        **optimizers,
        "trainer": plain_state(loop),
    }


def pieces_of(loop: TrainingRun) -> dict[str, dict[str, Piece]]:
    """Name of a part, except "trainer" -> the pieces of it that this rank writes. The ranks exchange nothing."""
    shares, parts = {}, {}
    for name, owner in loop.nets.saved.items():
        shares[name] = loop.sharding(owner.layout.whole_sizes(owner.master_params))
        parts[name] = pieces.of_network(owner, owner.master_params, shares[name])
    for rate, tensors in zip(loop.ema_rate, loop.averages.local):
        parts[f"ema_{rate}"] = pieces.of_network(loop.nets.trainer, tensors, shares["model"])
    for role, network in loop.nets.trained.items():
        name = "model" if role == ONLINE else role
        parts[file_of(role)] = pieces.of_optimizer(network.opt, network.trainer.layout, shares[name])
    return parts


def plain_state(loop: TrainingRun) -> dict[str, Any]:
    """The state that a resumed run needs besides networks, averages and optimizers."""
    objective = loop.objective
    began = loop.images_seen if loop.averages_began is None else loop.averages_began
    # The keys "memory" and "watchers" are kept for old checkpoints: they hold the history and the callbacks.
    rest = {
        "memory": objective.history and objective.history.state_dict(),
        "watchers": {each.name: each.state_dict() for each in loop.callbacks},
        "objective": objective.state_dict(),
        "trainers": {name: other.state_dict() for name, other in loop.nets.other_trainers.items()},
        "averages_began": began if any(rate.power_std for rate in loop.ema_rate) else 0,
    }
    return loop.nets.trainer.state_dict() | {name: value for name, value in rest.items() if value}


def save_in_shares(loop: TrainingRun, is_last: bool) -> None:
    """Let every rank write its share of a checkpoint. All ranks must call it; the run must have a `ShareWriter`."""
    assert loop.writer is not None, "--checkpoint_format dcp"
    groups = {file_of(role): pieces.groups_of(network.opt) for role, network in loop.nets.trained.items()}
    plain = {"trainer": plain_state(loop) | {GROUPS: groups}}
    loop.writer.save(checkpoint_of(loop), pieces_of(loop), plain, is_last)


def checkpoint_of(loop: TrainingRun) -> manifest.Checkpoint:
    """A checkpoint of the current step, not written yet."""
    return loop.checkpoints.checkpoint(
        loop.step, loop.images_seen, loop.flags, loop.elapsed_seconds(), initial_weights(loop)
    )


def initial_weights(loop: TrainingRun) -> dict[str, float]:
    """Average -> the fraction of the initial weights that it still contains."""
    return {f"ema_{rate}": share for rate, share in zip(loop.ema_rate, loop.averages.initial_weight)}


def file_of(role: str) -> str:
    """The name under which a checkpoint holds the optimizer of a trained network: "opt" for the online one's."""
    return "opt" if role == ONLINE else f"opt_{role}"


def load_state_dict(loop: TrainingRun, checkpoint: manifest.Checkpoint) -> None:
    """Load the state of a checkpoint, on every rank.

    :raises UserError: if the checkpoint lacks a part or does not fit the networks.
    """
    def params(name: str, owner: MasterWeights) -> list[Tensor]:
        return read_params(owner, load_part(name, checkpoint, verify), checkpoint.path(name) or name)

    take_class_names(loop, checkpoint)
    latents.require_same(
        checkpoint.config.get(RECORD, ""), loop.flags.get(RECORD, ""), (checkpoint.manifest, "this run")
    )
    verify = loop.checkpoints.verify
    changed = changes(checkpoint.config, loop.flags)
    logger.log(f"resuming from step {checkpoint.step} in {checkpoint.directory}{changed}")
    loop.step, loop.images_seen, loop.seconds_before = checkpoint.step, checkpoint.images_seen, checkpoint.seconds
    for name, owner in loop.nets.saved.items():
        owner.load_master_params(params(name, owner))
    for rate in loop.ema_rate:
        name = f"ema_{rate}"
        share = averages.initial_weight(checkpoint, name)
        loop.averages.load(rate.name, params(name, loop.nets.trainer), 0.0 if share is None else share)
    rest = load_part("trainer", checkpoint, verify)
    for role, network in loop.nets.trained.items():
        file = file_of(role)
        load_optimizer(network, load_part(file, checkpoint, verify), rest.get(GROUPS, {}).get(file))
    loop.nets.trainer.load_state_dict(rest)
    loop.averages_began = rest.get("averages_began", 0)
    for name, trainer in loop.nets.other_trainers.items():
        trainer.load_state_dict(rest["trainers"][name])
    if loop.objective.history is not None:
        loop.objective.history.load_state_dict(rest["memory"])
    if "objective" in rest:
        loop.objective.load_state_dict(_interned(rest["objective"]))
    for callback in loop.callbacks:
        if callback.name in rest.get("watchers", {}):
            callback.load_state_dict(rest["watchers"][callback.name])


def load_optimizer(network: TrainedNetwork, saved: Any, groups: list[dict[str, Any]] | None) -> None:
    """Load the saved optimizer of a network.

    :param saved: its state dict, or the tensors of a folder.
    :param groups: its param_groups, if `saved` is a folder; else None.
    """
    if groups is not None:
        saved = pieces.optimizer_state(saved, groups)
        if isinstance(network.opt, th.optim.Optimizer):     # of whole parameters
            saved["state"] = {place: read(entry) for place, entry in saved["state"].items()}
    network.load_optimizer(saved)
    if groups is not None:
        pieces.lay_out_as_params(network.opt)


def take_class_names(loop: TrainingRun, checkpoint: manifest.Checkpoint) -> None:
    """Check that the classes of the data are those of the checkpoint. If the data has no names, take the checkpoint's.

    :raises UserError: if the classes differ, unless the run allows it.
    """
    known, found = checkpoint.class_names, loop.checkpoints.class_names
    data = loop.flags.get("data_dir") or "the data"
    if warning := require_same(known, found, checkpoint.manifest, data, loop.config.allow_other_classes):
        logger.warn(warning)
    loop.checkpoints.class_names = found or known


def _interned(value: Any) -> Any:
    """The same nested dicts with interned keys.

    A pickle writes equal words once per string object, and a resumed run should write the same bytes.
    """
    if not isinstance(value, dict):
        return value
    return {sys.intern(key) if isinstance(key, str) else key: _interned(each) for key, each in value.items()}


def write_status(loop: TrainingRun) -> None:
    """Write a file next to the log that says whether the run is finished: a stopped run also ends with status 0.

    If the run is killed, the file has the values of its start.
    """
    status = {"finished": loop.step >= loop.total_training_steps, "step": loop.step, "of": loop.total_training_steps}
    text = json.dumps(status).encode()

    def write() -> None:
        try:
            storage.make_folder(logger.get_dir())
            storage.write_atomically(os.path.join(logger.get_dir(), STATUS), lambda file: file.write(text))
        except (OSError, UserError) as error:               # a run need not end: the checkpoint has the step, too
            logger.warn(f"{STATUS} was not updated: {error}")

    dist.on_main(write)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The flags that have changed since the checkpoint, for the log."""
    places = ("log_dir", "resume", "resume_checkpoint", "total_training_steps")
    words = [
        f"{name} {before[name]!r} -> {value!r}"
        for name, value in now.items() if name in before and name not in places and before[name] != value
    ]
    return f"; flags that have changed since: {', '.join(words)}" if words else ""


def load_part(name: str, checkpoint: manifest.Checkpoint, verify: bool = True) -> Any:
    """The content of one file of a checkpoint, on every rank.

    :param verify: compare its size and checksum with the manifest while it is read.
    :raises UserError: if the checkpoint has no such file, or it is damaged.
    """
    path = checkpoint.path(name)
    if path is None:
        raise UserError(
            f"the checkpoint has no {name!r}: give the flags that it was made with (--ema_rate names its averages), "
            "or start a new run from its weights: --resume_checkpoint with one of its ema files, and another --log_dir"
        )
    if path.endswith(dcp.SUFFIX):                           # every rank reads what it needs
        return dist.everywhere(dcp.open_part, path, checkpoint.facts(path), verify)
    return dist.load_state_dict(path, map_location="cpu", expected=checkpoint.facts(path) if verify else None)


def read_params(owner: MasterWeights, saved: Mapping[str, Tensor], source: str) -> list[Tensor]:
    """The parameters in a saved state dict, one tensor each; the network's buffers are set from it."""
    loading.check(owner.model, saved, source)
    loading.copy_buffers(owner.model, saved)
    return owner.params_in(saved)
