"""openai/consistency_models' `cm.train_util`: the training loops by keyword arguments.

A compatibility module. `cm.training.loop.TrainLoop` takes a config and built parts; here are the same loops with the
arguments, and the methods, that users of guided-diffusion and consistency_models call.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cm.checkpoints import file_names
from cm.checkpoints.loading import WeightsFile
from cm.io import storage
from cm.logging import logger
from cm.objectives.base import Objective
from cm.objectives.curricula import Curriculum
from cm.objectives.edm import EDM
from cm.training.config import CompanionNetwork, DataSource, LoopConfig, RunParts
from cm.training.loop import TrainLoop as Loop
from cm.training.loop import as_batch
from cm.training.mixed_precision import INITIAL_LOG_LOSS_SCALE
from cm.training.trained_network import TrainedNetwork
from cm.types import Batch, Callback

__all__ = [
    "INITIAL_LOG_LOSS_SCALE", "CMTrainLoop", "TrainLoop", "find_ema_checkpoint", "find_resume_checkpoint",
    "get_blob_logdir", "log_loss_dict", "parse_resume_step_from_filename",
]

CONFIG_NAMES = {field.name for field in dataclasses.fields(LoopConfig)}


class TrainLoop(Loop):
    """Train one network; the loop resumes while it is constructed, as guided-diffusion's does.

    :param schedule_sampler: the distribution of noise levels of the diffusion's own denoising loss.
    :param objective: what to minimise instead of that loss.
    :param config: resolved flags, saved with every checkpoint.
    :param options: the fields of `LoopConfig`.
    :raises TypeError: for a keyword that is none of them.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: Any,
        data: DataSource,
        schedule_sampler: Any = None,
        objective: Objective | None = None,
        config: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        start: WeightsFile | None = None,
        **options: Any,
    ):
        if unknown := options.keys() - CONFIG_NAMES:
            raise TypeError(f"{type(self).__name__} got unexpected keywords {', '.join(sorted(unknown))}; "
                            f"choose among {', '.join(sorted(CONFIG_NAMES))}")
        if objective is None:
            objective = EDM(diffusion.weight, **({"schedule_sampler": schedule_sampler} if schedule_sampler else {}))
        parts = RunParts(model, diffusion, objective, data, self._companions(), callbacks, start, dict(config or {}))
        super().__init__(LoopConfig(**options), parts)
        self.resume()

    def _companions(self) -> dict[str, CompanionNetwork]:
        return {}

    def run_step(self, batch: Batch | Tensor, cond: Mapping[str, Tensor] | None = None) -> None:
        """One optimizer step on a batch, or on images [N,C,H,W] in [-1, 1] and their conditioning."""
        item = batch if isinstance(batch, Batch) else (batch, dict(cond or {}))
        super().run_step(as_batch(item, self.images_seen, self.rank, self.world_size))

    def forward_backward(self, batch: Any, cond: Any = None, network: TrainedNetwork | None = None) -> None:
        """Gradients of the mean loss over a batch, or over images and their conditioning."""
        item = batch if isinstance(batch, Batch) else (batch, dict(cond or {}))
        ready = as_batch(item, self.images_seen, self.rank, self.world_size)
        super().forward_backward(ready, network=network or self.trained[self.objective.trains(self.step)])

    def log_step(self) -> None:
        """Put the step and the number of samples into the next row of the log."""
        logger.logkv("step", self.step)
        logger.logkv("samples", self.images_seen)


class CMTrainLoop(TrainLoop):
    """Train a consistency model, by distillation or alone, or distil progressively.

    :param target_model: the slowly moving copy that online outputs are compared with (None for progdist).
    :param teacher_model: the diffusion model to distil (None for consistency training).
    :param teacher_diffusion: the teacher's KarrasDenoiser.
    :param training_mode: consistency_distillation, consistency_training or progdist.
    :param ema_scale_fn: step -> (target decay rate, number of noise levels N).
    :param options: those of `TrainLoop`.
    """

    def __init__(
        self,
        *,
        target_model: nn.Module | None,
        teacher_model: nn.Module | None,
        teacher_diffusion: Any,
        training_mode: str,
        ema_scale_fn: Curriculum,
        total_training_steps: int,
        **options: Any,
    ):
        self.target_model, self.teacher_model, self.teacher_diffusion = target_model, teacher_model, teacher_diffusion
        self.training_mode, self.ema_scale_fn = training_mode, ema_scale_fn
        for network in (target_model, teacher_model):
            if network is not None:
                network.requires_grad_(False)
        self._diffusion = options["diffusion"]
        options["objective"] = self._diffusion.consistency_objective(training_mode, ema_scale_fn)
        super().__init__(total_training_steps=total_training_steps, **options)

    def _companions(self) -> dict[str, CompanionNetwork]:
        given = {"target_model": (self.target_model, self._diffusion),
                 "teacher_model": (self.teacher_model, self.teacher_diffusion)}
        return {name: CompanionNetwork(model, scalings)
                for name, (model, scalings) in given.items() if model is not None}

    def reset_training_for_progdist(self) -> None:
        """Begin a new stage: a fresh optimizer, averages that start from the present weights."""
        self.reset_optimizer_and_ema()


# --- functions that public code calls ---------------------------------------------------------------------------------


def parse_resume_step_from_filename(filename: str) -> int:
    """'path/to/model012345.pt' -> 12345; 0 where the name ends in no step."""
    match = re.search(r"model(\d+)\.pt$", os.path.basename(filename))
    return int(match[1]) if match else 0


def get_blob_logdir() -> str:
    """The folder of checkpoints: the log's."""
    return logger.get_dir()


def find_resume_checkpoint() -> None:
    """Nothing: the loop finds the newest checkpoint by its manifest."""


def find_ema_checkpoint(main_checkpoint: str, step: int, rate: str | float) -> str | None:
    """The path of an average next to a model file; None where there is none."""
    if not main_checkpoint:
        return None
    path = storage.join(os.path.dirname(main_checkpoint), file_names.file_name(f"ema_{rate}", step))
    return path if storage.exists(path) else None


def log_loss_dict(diffusion: Any, ts: Tensor, losses: Mapping[str, Tensor]) -> None:
    """Log the mean of each loss [N], and by quarter of the timesteps `ts` [N], as `name` and `name_q0` .. `name_q3`."""
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for t, value in zip(ts.tolist(), values.tolist()):
            logger.logkv_mean(f"{name}_q{int(4 * t / diffusion.num_timesteps)}", value)
