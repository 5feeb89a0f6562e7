"""Averages of any width after training: the snapshots that they are made of, their files, and their quality."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
import torch as th

from cm.checkpoints import file_names, manifest
from cm.checkpoints.loading import WeightsFile
from cm.config.flags import Settings
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.generate.engine import SamplingPlan, draw_batches
from cm.io import storage
from cm.logging import logger
from cm.samplers.sample import SampleOptions
from cm.setup.model import model_from
from cm.setup.network import load_network
from cm.setup.run import run_precision
from cm.setup.sample import sampling_diffusion
from cm.training.callbacks import Metric
from cm.training.ema_snapshots import Snapshot, combine
from cm.training.power_ema import Mix, Profile, gamma_of, mix

WIDE, TOO_WIDE = 2.0, 2.5                                   # times the widest tracked width: warn, and refuse
ROUGH, TOO_ROUGH = 0.01, 0.05                               # error of the profile: warn, and refuse


@dataclass(frozen=True)
class Average:
    """One average to make."""

    std: float
    mix: Mix

    @property
    def name(self) -> str:
        """The first part of the name of its file."""
        return f"ema_posthoc{self.std:g}"


def parse_widths(text: str) -> list[float]:
    """'0.05,0.1' -> [0.05, 0.1]; '0.02:0.04' -> [0.02, 0.03, 0.04]; '0.02:0.1:0.04' -> [0.02, 0.06, 0.1].

    :raises UserError: if it is not a list of widths, or a width is out of range.
    """
    found: list[float] = []
    for part in text.split(","):
        try:
            words = [Decimal(word.strip()) for word in part.split(":")]
            low, high, step = (*words, Decimal("0.01"))[:3] if len(words) > 1 else (words[0], words[0], Decimal(1))
            if len(words) > 3 or not (low <= high and step > 0):
                raise ValueError
            count = int((high - low) / step) + 1
        except (ValueError, InvalidOperation, OverflowError):
            raise UserError(f"--std {text!r}: {part!r} is not a width such as 0.05, nor a rising range such as "
                            "0.02:0.2 or 0.02:0.2:0.02") from None
        found += [float(low + i * step) for i in range(count)]
    for std in found:
        gamma_of(std)                                       # raises for what is none
    return list(dict.fromkeys(found))


# --- from snapshots to averages --------------------------------------------------------------------------------------


def snapshots_until(snapshots: Sequence[Snapshot], step: int) -> tuple[list[Snapshot], int, int]:
    """The snapshots from which an average at a step can be made, the step, and the images seen at that step.

    Between two snapshots the images are those of a constant batch.

    :param step: 0 for the last that has a snapshot.
    :raises UserError: for a step after the last snapshot, or before the first.
    """
    steps = [each.checkpoint.step for each in snapshots]
    step = step or steps[-1]
    if not steps[0] <= step <= steps[-1]:
        raise UserError(f"--step {step}: there are snapshots from step {steps[0]} to {steps[-1]}; choose one of those, "
                        "or a step between them")
    images = [each.checkpoint.images_seen for each in snapshots]
    return [each for each in snapshots if each.checkpoint.step <= step], step, round(np.interp(step, steps, images))


def plan_averages(
    stds: Sequence[float], snapshots: Sequence[Snapshot], images: int, extrapolate: bool
) -> list[Average]:
    """The coefficients for an average of each width; warns of widths that are only approximated.

    :param images: images seen at the step of the averages.
    :raises UserError: for a width that the snapshots do not determine, unless `extrapolate`.
    """
    widest, profiles = max(each.std for each in snapshots), [each.profile for each in snapshots]
    averages = [Average(std, mix(profiles, Profile.of(images, std))) for std in stds]
    for each in averages:
        error = each.mix.error
        what = (f"width {each.std:g}: the profile made of {len(snapshots)} snapshots, the widest of {widest:g}, "
                f"differs by {error:.1%} from the one asked for")
        if (each.std > TOO_WIDE * widest * (1 + 1e-9) or error > TOO_ROUGH) and not extrapolate:
            raise UserError(f"--std: {what}; choose a width nearer to the tracked ones, take more snapshots "
                            "(--ema_snapshot_interval), or give --extrapolate True")
        if each.std > WIDE * widest * (1 + 1e-9) or error > ROUGH:
            logger.warn(what)
    return averages


def write_average(
    settings: Settings, average: Average, snapshots: Sequence[Snapshot], checkpoint: manifest.Checkpoint
) -> manifest.Checkpoint:
    """Make an average and add it to a checkpoint; returns the new checkpoint. All ranks must call it together.

    :raises UserError: if a snapshot is damaged, or the file cannot be written.
    """
    with th.device("meta"):
        buffers = {name for name, _ in model_from(settings).named_buffers()}
    weights = combine(snapshots, average.mix.coefficients, buffers, settings.values["verify_weights"])
    return dist.on_main(manifest.add, checkpoint, average.name, weights)


def checkpoint_for(folder: str, step: int, images: int, snapshot: Snapshot) -> manifest.Checkpoint:
    """The checkpoint for the averages of a step: an existing one with its files, or a new one. Call it on one rank.

    :raises UserError: if the existing one belongs to another run and would lose its files.
    """
    source = snapshot.checkpoint
    path = storage.join(folder, file_names.manifest_name(step))
    if storage.exists(path):
        if (found := manifest.read(path)).config == source.config:
            return found
        raise UserError(f"--log_dir {folder} has a checkpoint of step {step} of another run, {path}, whose files would "
                        "be lost: choose another --log_dir")
    return manifest.Checkpoint(folder, step, images, dict(source.config), {}, class_names=source.class_names)


# --- measuring them --------------------------------------------------------------------------------------------------


def distance_of(
    settings: Settings, checkpoint: manifest.Checkpoint, average: Average, plan: SamplingPlan, options: SampleOptions,
    metric: Metric,
) -> float:
    """The distance of samples of an average from the reference; the same on all ranks, which must call it together."""
    path = os.path.join(checkpoint.directory, file_names.file_name(average.name, checkpoint.step))
    settings.sources["model_path"] = WeightsFile(path, expected=checkpoint.facts(path))
    model, diffusion = load_network(settings, "model_path"), sampling_diffusion(settings)
    drawn = draw_batches(model, diffusion, plan, run_precision(settings), options, f"width {average.std:g}")
    value = metric.distance((int(rows[0]), images) for rows, images in drawn if len(images))
    logger.log(f"width {average.std:g}: {metric.label} {value:.6g}")
    return value
