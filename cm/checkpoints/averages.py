"""How much of a run's initial weights its weight averages still contain, and which file to use instead.

Without warm-up, an average of rate r contains r^k of them after k steps: at 0.9999 after 868 steps 92 %, which is noise
if the run began with random weights.
"""

from __future__ import annotations

import os
import re

from cm.checkpoints import manifest
from cm.checkpoints.file_names import parse_name
from cm.checkpoints.manifest import Checkpoint
from cm.logging import logger

TOO_MUCH = 0.05
"""If an average still contains more than this fraction of the initial weights, sampling from it gives a warning."""
HALF_LIFE = "kimg"                                          # the end of a half-life's name, as in ema_500kimg


def initial_weight(checkpoint: Checkpoint, name: str) -> float | None:
    """The fraction of the initial weights in an average such as "ema_0.9999"; None if it is not known.

    Older manifests do not contain it. Their runs had no warm-up of decay rates, and progressive distillation restarted
    its averages at steps that are not recorded.
    """
    if name in checkpoint.initial_weight:
        return checkpoint.initial_weight[name]
    if not name.startswith("ema_") or checkpoint.config.get("training_mode") == "progdist":
        return None
    rate = name.removeprefix("ema_")
    if not re.fullmatch(r"[\d.e-]+(kimg)?", rate):          # a power function, which copied the weights at its start
        return 0.0
    if not rate.endswith(HALF_LIFE):
        return float(rate) ** checkpoint.step
    if checkpoint.config.get("ema_rampup_ratio") and checkpoint.step:
        return 0.0                                          # the first step copied the weights
    return 0.5 ** (checkpoint.images_seen / (1000 * float(rate.removesuffix(HALF_LIFE))))


def is_immature(checkpoint: Checkpoint, name: str) -> bool:
    """Whether an average is known to hold more than `TOO_MUCH` of the initial weights."""
    return (initial_weight(checkpoint, name) or 0.0) > TOO_MUCH


def best_name(checkpoint: Checkpoint) -> str:
    """The part of a checkpoint to sample: the first average with little of the initial weights, else the model."""
    averages = [name for name in checkpoint.names() if name.startswith("ema_")]
    fit = [name for name in averages if not is_immature(checkpoint, name)]
    if fit or "model" in checkpoint.names() or not averages:
        return fit[0] if fit else "model"
    return min(averages, key=lambda name: initial_weight(checkpoint, name) or 0.0)


def newest_weights(directory: str, verify: bool = True) -> str | None:
    """The file to sample from the newest checkpoint of a folder, which may be a milestone; None without a checkpoint.

    Incomplete and damaged checkpoints are skipped with a warning. Call it on one rank.

    :param verify: compare the checksum of this file, which reads it; for the other files, only sizes are compared.
    """
    for checkpoint in manifest.newest_first(directory):
        path = checkpoint.path(best_name(checkpoint))
        problem = checkpoint.problem(verify=False) if path else "it holds no weights"
        if path and not problem and verify and checkpoint.problem_of(os.path.basename(path)):
            problem = f"{path} is damaged (its checksum differs from the manifest)"
        if path and not problem:
            return path
        logger.warn(f"skipping {checkpoint.manifest}: {problem}")
    return None


def warning(checkpoint: Checkpoint, path: str) -> str:
    """A warning for sampling from a file of the checkpoint; empty if there is nothing to warn of."""
    parsed = parse_name(path)
    if parsed is None or not is_immature(checkpoint, parsed[0]):
        return ""
    other = best_name(checkpoint)
    remedy = "train for longer" if other == parsed[0] else f"take {checkpoint.path(other)}"
    share = initial_weight(checkpoint, parsed[0])
    return (f"{path} still holds {share:.0%} of the weights that the run started from, so its images may be no better "
            f"than theirs: {remedy}")
