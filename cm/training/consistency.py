"""The loops under the names that guided-diffusion and consistency_models give them: TrainLoop and CMTrainLoop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from cm.training.loop import TrainLoop
from cm.training.mixed_precision import MasterWeights
from cm.types import Networks

__all__ = ["CMTrainLoop", "TrainLoop"]


class CMTrainLoop(TrainLoop):
    """Train a consistency model, by distillation or alone, or distil progressively.

    :param target_model: the slowly moving copy that online outputs are compared with (None for progdist).
    :param teacher_model: the diffusion model to distil (None for consistency training).
    :param teacher_diffusion: the teacher's KarrasDenoiser.
    :param training_mode: consistency_distillation, consistency_training or progdist.
    :param ema_scale_fn: step -> (target decay rate, number of noise levels N).
    """

    def __init__(
        self,
        *,
        target_model: nn.Module | None,
        teacher_model: nn.Module | None,
        teacher_diffusion: Any,
        training_mode: str,
        ema_scale_fn: Callable[[int], tuple[float, int]],
        total_training_steps: int,
        diffusion: Any,
        **kwargs: Any,
    ):
        self.target_model, self.teacher_model, self.teacher_diffusion = target_model, teacher_model, teacher_diffusion
        self.training_mode, self.ema_scale_fn = training_mode, ema_scale_fn
        for network in (target_model, teacher_model):
            if network is not None:
                network.requires_grad_(False)
        super().__init__(
            diffusion=diffusion,
            objective=diffusion.consistency_objective(training_mode, ema_scale_fn),
            total_training_steps=total_training_steps,
            **kwargs,
        )
        for step in (0, self.total_training_steps - 1):         # not hours later, where the curriculum has gone too far
            self.objective.intervals(ema_scale_fn(step)[1])

    def companions(self) -> dict[str, MasterWeights]:
        moving = {"target_model": self.target_model}
        if self.training_mode == "progdist":                    # each stage's teacher is the student of the one before
            moving["teacher_model"] = self.teacher_model
        elif self.teacher_model is not None and self.trainer.use_fp16:
            self.teacher_model.convert_to_fp16()                # it stands still: nobody needs its masters
        return {
            name: MasterWeights(network, self.trainer.precision)
            for name, network in moving.items() if network is not None
        }

    def make_nets(self) -> Networks:
        nets = super().make_nets()
        if self.target_model is not None:
            nets.target, nets.target_model = self.diffusion.bind(self.target_model), self.target_model
            nets.target_params = self.moving["target_model"].master_params
        if self.teacher_model is not None:
            nets.teacher, nets.teacher_model = self.teacher_diffusion.bind(self.teacher_model), self.teacher_model
        if "teacher_model" in self.moving:
            nets.teacher_params = self.moving["teacher_model"].master_params
        return nets

    def start_from(self, path: str) -> None:
        super().start_from(path)
        if self.step == 0 and "target_model" in self.moving:
            self.moving["target_model"].load_master_params(self.trainer.master_params)

    def extra_logs(self) -> dict[str, float]:
        target_ema, num_scales = self.ema_scale_fn(self.step - 1)
        return {"target_ema": target_ema, "num_scales": num_scales}
