"""Consistency distillation and training: Song et al. 2023 (Consistency Models, arXiv 2303.01469), algorithms 2 and 3.

Shapes: N batch, C channels, H and W height and width. Times are noise levels: t > t2 are neighbours on a grid.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.objectives.base import TARGET, TEACHER, GridObjective
from cm.random_util import SharedDropout
from cm.samplers.heun import Heun
from cm.tensors import append_dims, update_ema
from cm.types import Batch, LossTerms, Networks


class Consistency(GridObjective):
    """weight(t) d(f(x_t, t), f_target(x_t2, t2)), where x_t2 lies on the path of the ODE through x_t.

    num_scales is the number of noise levels on the grid.
    """

    companions = (TARGET,)
    distillation = True
    sampler = "onestep"

    @abstractmethod
    def follow(self, nets: Networks, batch: Batch, noise: Tensor, x_t: Tensor, t: Tensor, t2: Tensor) -> Tensor:
        """x_t2, one step from t down to t2: [N,C,H,W]."""

    def intervals(self, num_scales: int) -> int:
        if num_scales < 2:
            raise UserError(
                f"consistency losses compare neighbouring noise levels: num_scales must be at least 2, got {num_scales}"
            )
        return num_scales - 1

    def terms(self, nets: Networks, batch: Batch, noise: Tensor, index: Tensor, num_scales: int) -> LossTerms:
        if nets.target is None:
            raise UserError("consistency losses compare with a target network: give a target_model")
        x0, cond = batch.images, batch.cond
        grid = self.levels(num_scales, device=x0.device, dtype=x0.dtype)
        t, t2 = grid[index], grid[index + 1]
        x_t = x0 + noise * append_dims(t, x0.ndim)
        masks = SharedDropout(x0.device)
        # Without gradients first: this memory is free again before the online network keeps its activations.
        with th.no_grad():
            x_t2 = self.follow(nets, batch, noise, x_t, t, t2)
            with masks:
                target = nets.target(x_t2, t2, **cond)
        with masks:
            denoised = nets.online(x_t, t, **cond)
        loss = self.weight(t) * self.distance(denoised, target)
        return LossTerms(loss, t)

    def after_step(self, nets: Networks, step: int) -> bool:
        """Move the target a little toward the online network."""
        target_ema, _ = self.curriculum(step)
        update_ema(nets.target_params, nets.online_params, target_ema)
        return False


class ConsistencyDistillation(Consistency):
    """x_t2 by one Heun step along the teacher's ODE."""

    companions = (TARGET, TEACHER)

    def follow(self, nets: Networks, batch: Batch, noise: Tensor, x_t: Tensor, t: Tensor, t2: Tensor) -> Tensor:
        if nets.teacher is None:
            raise UserError("consistency distillation needs a teacher: give a teacher_model")
        return Heun().step(partial(nets.teacher, **batch.cond), x_t, t, t2, None)


class ConsistencyTraining(Consistency):
    """x_t2 = x0 + t2 z: an Euler step along (x_t - x0) / t, an unbiased estimate of the ODE's slope."""

    def follow(self, nets: Networks, batch: Batch, noise: Tensor, x_t: Tensor, t: Tensor, t2: Tensor) -> Tensor:
        return batch.images + noise * append_dims(t2, noise.ndim)
