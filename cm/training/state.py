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
GROUPS = "param_groups"                                     # of optimizers, where their state lies in a folder


class TrainingRun(Protocol):
    """What a checkpoint is made of, and what resuming changes; `cm.training.loop.TrainLoop` has it.

    :ivar ema_rate: the rate of each average.
    :ivar averages_began: the images seen when the averages last began; None before the next step.
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
        """Which rank writes which of so many tensors."""
        ...

    def elapsed_seconds(self) -> float:
        """Seconds of training so far, over all starts of the run."""
        ...


def state_dict(loop: TrainingRun) -> dict[str, Any]:
    """name -> state dict, on rank 0; empty on the others, which give their shards. All ranks call it together.

    The step, the images seen, the seconds trained and the flags are in the manifest. No random stream is saved: every
    draw is a function of the seed and of the position, or the step, it belongs to.
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
    """name -> what this rank writes of it, of all but "trainer", where every rank writes; nothing is sent."""
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
    # The keys "memory" and "watchers" are those of every checkpoint so far.
    rest = {
        "memory": objective.history and objective.history.state_dict(),
        "watchers": {each.name: each.state_dict() for each in loop.callbacks},
        "objective": objective.state_dict(),
        "trainers": {name: other.state_dict() for name, other in loop.nets.other_trainers.items()},
        "averages_began": began if any(rate.power_std for rate in loop.ema_rate) else 0,
    }
    return loop.nets.trainer.state_dict() | {name: value for name, value in rest.items() if value}


def save_in_shares(loop: TrainingRun, is_last: bool) -> None:
    """Let every rank write its share of a checkpoint. All ranks must call it, in a run with such a writer."""
    assert loop.writer is not None, "--checkpoint_format dcp"
    groups = {file_of(role): pieces.groups_of(network.opt) for role, network in loop.nets.trained.items()}
    plain = {"trainer": plain_state(loop) | {GROUPS: groups}}
    loop.writer.save(checkpoint_of(loop), pieces_of(loop), plain, is_last)


def checkpoint_of(loop: TrainingRun) -> manifest.Checkpoint:
    """A checkpoint of the present step, still to be written."""
    return loop.checkpoints.checkpoint(
        loop.step, loop.images_seen, loop.flags, loop.elapsed_seconds(), initial_weights(loop)
    )


def initial_weights(loop: TrainingRun) -> dict[str, float]:
    """Average -> the share that it still holds of the weights that it started from."""
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
    :param groups: its settings, where there is a folder.
    """
    if groups is not None:
        saved = pieces.optimizer_state(saved, groups)
        if isinstance(network.opt, th.optim.Optimizer):     # of whole parameters
            saved["state"] = {place: read(entry) for place, entry in saved["state"].items()}
    network.load_optimizer(saved)
    if groups is not None:
        pieces.lay_out_as_params(network.opt)


def take_class_names(loop: TrainingRun, checkpoint: manifest.Checkpoint) -> None:
    """Make sure that class numbers mean to the data what they mean to the checkpoint; names that the data does not have
    are kept from it.

    :raises UserError: if they do not, unless the run allows it.
    """
    known, found = checkpoint.class_names, loop.checkpoints.class_names
    data = loop.flags.get("data_dir") or "the data"
    if warning := require_same(known, found, checkpoint.manifest, data, loop.config.allow_other_classes):
        logger.warn(warning)
    loop.checkpoints.class_names = found or known


def _interned(value: Any) -> Any:
    """The same dicts with the words of their keys as the code has them.

    A file spells a word out once per string object that holds it, and a resumed run shall write the same bytes.
    """
    if not isinstance(value, dict):
        return value
    return {sys.intern(key) if isinstance(key, str) else key: _interned(each) for key, each in value.items()}


def write_status(loop: TrainingRun) -> None:
    """Write next to the log whether the run is finished: a stopped one ends with status 0, too.

    Where a run was killed, the file says what was so at its start.
    """
    status = {"finished": loop.step >= loop.total_training_steps, "step": loop.step, "of": loop.total_training_steps}
    text = json.dumps(status).encode()

    def write() -> None:
        try:
            storage.make_folder(logger.get_dir())
            storage.write_atomically(os.path.join(logger.get_dir(), STATUS), lambda file: file.write(text))
        except (OSError, UserError) as error:               # the checkpoint is there, and says as much
            logger.warn(f"{STATUS} was not updated: {error}")

    dist.on_main(write)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The flags that are not what they were, for the log."""
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
    if path.endswith(dcp.SUFFIX):                           # of which every rank reads what it needs
        return dist.everywhere(dcp.open_part, path, checkpoint.facts(path), verify)
    return dist.load_state_dict(path, map_location="cpu", expected=checkpoint.facts(path) if verify else None)


def read_params(owner: MasterWeights, saved: Mapping[str, Tensor], source: str) -> list[Tensor]:
    """A saved state dict as one tensor per parameter of a network, where it was loaded to."""
    loading.check(owner.model, saved, source)
    loading.copy_buffers(owner.model, saved)
    return owner.params_in(saved)
