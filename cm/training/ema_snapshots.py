"""Snapshots of power-function averages: written during training, found again, and combined into other averages.

A snapshot is a checkpoint with these averages only. Snapshots have a folder of their own in the run's folder, and are
never removed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch as th
from torch import Tensor

from cm.checkpoints import file_names, manifest
from cm.checkpoints.manager import archive_after
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage
from cm.logging import logger
from cm.objectives import OBJECTIVES
from cm.training.ema_rates import POWER
from cm.training.loop import TrainLoop
from cm.training.power_ema import Profile

FOLDER = "ema_snapshots"


# --- while a run trains ----------------------------------------------------------------------------------------------


@dataclass
class EmaSnapshots:
    """Writes the power-function averages after every `interval` steps, and after the last; a callback of the loop."""

    interval: int
    name = "ema_snapshots"
    started = False

    def after_step(self, loop: TrainLoop) -> dict[str, float]:
        """Write the snapshot of this step if it is due.

        :raises UserError: on every rank, if it cannot be written and the run must not go on without it.
        """
        folder = storage.join(loop.checkpoints.directory, FOLDER)
        if not self.started:                                # the run may have gone back to an earlier step
            dist.on_main(archive_after, folder, loop.step - 1)
            self.started = True
        if loop.step % self.interval and loop.step != loop.total_training_steps:
            return {}
        names = [rate.name for rate in loop.ema_rate if rate.power_std is not None]
        averages = {f"ema_{name}": loop.averages.gather_to_main(name) for name in names}
        try:
            dist.on_main(self.write, loop, folder, averages)
        except UserError as error:
            if loop.checkpoints.on_save_error == "stop":
                raise
            logger.warn(f"training continues without the snapshot of step {loop.step}: {error}")
        return {}

    def write(self, loop: TrainLoop, folder: str, averages: dict[str, list[Tensor]]) -> None:
        """Write a snapshot; on one rank."""
        content = {name: loop.trainer.master_params_to_state_dict(params) for name, params in averages.items()}
        manifest.save(
            folder, loop.step, content, loop.flags, loop.images_seen, classes=loop.checkpoints.class_names
        )

    def state_dict(self) -> dict[str, float]:
        """There is no state: a snapshot does not depend on earlier ones."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """There is no state."""


# --- afterwards ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """One power-function average at one step."""

    checkpoint: manifest.Checkpoint
    name: str                                               # "ema_power0.05"

    @property
    def std(self) -> float:
        """The relative width."""
        return float(self.name.removeprefix(f"ema_{POWER}"))

    @property
    def profile(self) -> Profile:
        """The weight of each training step in the average."""
        return Profile.of(self.checkpoint.images_seen, self.std)

    @property
    def path(self) -> str:
        """The path of its file."""
        path = self.checkpoint.path(self.name)
        assert path is not None, "it was found in the manifest"
        return path


def find_snapshots(run: str) -> list[Snapshot]:
    """All snapshots of a run that are still there, by step and width; also those in its checkpoints. For one rank.

    :raises UserError: if there are none, or the run restarted its averages in between.
    """
    found: dict[tuple[int, str], Snapshot] = {}
    for folder in (run, storage.join(run, FOLDER)):
        for step in file_names.steps(folder):
            checkpoint = manifest.read(storage.join(folder, file_names.manifest_name(step)))
            for name in checkpoint.names():
                if name.startswith(f"ema_{POWER}"):
                    found[step, name] = Snapshot(checkpoint, name)
    if not found:
        raise UserError(f"{run} has no power-function averages: train with --ema_rate power0.05,power0.10 and "
                        "--ema_snapshot_interval, for example a hundredth of the steps")
    modes = {str(each.checkpoint.config.get("training_mode")) for each in found.values()}
    if staged := [mode for mode in modes if mode in OBJECTIVES and OBJECTIVES[mode].has_stages]:
        raise UserError(f"{run} is a run of --training_mode {staged[0]}, which restarts its averages in each stage: "
                        "use an average that was tracked, such as ema_power0.05")
    return [found[key] for key in sorted(found)]


class Combination:
    """A weighted sum of snapshots, computed in float64 on rank 0.

    :param buffers: names of the network's buffers; they are copied from the last snapshot.
    """

    def __init__(self, buffers: Collection[str]):
        self.buffers = buffers
        self.total: dict[str, Tensor] = {}

    def add(self, coefficient: float, weights: dict[str, Tensor]) -> None:
        """Add a snapshot times its coefficient. Add the snapshots in the order of their steps."""
        for name, value in weights.items():
            if name in self.buffers:
                self.total[name] = value
            elif name in self.total:
                self.total[name].add_(value.double(), alpha=coefficient)
            else:
                self.total[name] = value.double() * coefficient

    def weights(self) -> dict[str, Tensor]:
        """The sum in float32."""
        return {name: value if name in self.buffers else value.float() for name, value in self.total.items()}


def combine(
    snapshots: Sequence[Snapshot], coefficients: Iterable[float], buffers: Collection[str], verify: bool = True
) -> dict[str, Tensor]:
    """The combination of snapshots on rank 0, {} on the others. All ranks must call it together.

    :param verify: compare their checksums with their manifests.
    :raises UserError: on every rank, for a file that is missing or damaged.
    """
    total, is_main = Combination(buffers), dist.is_main()
    for snapshot, coefficient in zip(snapshots, coefficients):
        expected = snapshot.checkpoint.facts(snapshot.path) if verify else None
        try:
            weights = dist.load_state_dict(snapshot.path, map_location="cpu", expected=expected)
        except FileNotFoundError:
            raise UserError(f"{snapshot.path}, which {os.path.basename(snapshot.checkpoint.manifest)} lists, is "
                            "missing: restore it, or remove that manifest") from None
        if is_main:
            with th.no_grad():
                total.add(float(coefficient), weights)
    return total.weights()
