"""Progressive distillation: Salimans and Ho 2022 (arXiv 2202.00512), algorithm 2, for the ODE in sigma.

A student learns to replace two Euler steps of its teacher by one; then it becomes the teacher of the next stage.

Shapes: N batch, C channels, H and W height and width. Times are noise levels: t > t_mid > t_end.
"""

from __future__ import annotations

from functools import partial

import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.logging import logger
from cm.objectives.base import Companion, GridObjective
from cm.samplers.euler import Euler
from cm.samplers.network_guidance import unguided
from cm.tensors import append_dims, copy_tensors
from cm.types import Batch, Denoiser, LossTerms, Networks


class ProgressiveDistillation(GridObjective):
    """weight(t) d(D(x_t, t), target), where one Euler step towards target equals two Euler steps of the teacher.

    num_scales is the number of the student's sampling steps.
    """

    companions = (Companion("teacher_model", "teacher", "by_objective"),)       # the student of the stage before
    has_stages = True
    result = "progressive_student"
    sampler = "progdist"

    def intervals(self, num_scales: int) -> int:
        if num_scales < 1:
            raise UserError(f"num_scales is the student's number of sampling steps, at least 1, got {num_scales}")
        return num_scales

    def terms(self, nets: Networks, batch: Batch, noise: Tensor, index: Tensor, num_scales: int) -> LossTerms:
        if nets.teacher is None:
            raise UserError("progressive distillation needs a teacher: give a teacher_model")
        x0, cond = batch.images, batch.cond
        grid = self.levels(2 * num_scales + 1, device=x0.device, dtype=x0.dtype)        # the teacher's, twice as fine
        t, t_mid, t_end = grid[2 * index], grid[2 * index + 1], grid[2 * index + 2]
        x_t = x0 + noise * append_dims(t, x0.ndim)
        with th.no_grad():
            teacher = partial(self.teacher_of(nets.teacher, num_scales), **cond)
            x_mid = Euler().step(teacher, x_t, t, t_mid, None)
            x_end = Euler().step(teacher, x_mid, t_mid, t_end, None)
            # One Euler step toward `target` leads from x_t to x_end.
            target = x_t - append_dims(t / (t_end - t), x0.ndim) * (x_end - x_t)
        loss = self.weight(t) * self.distance(nets.online(x_t, t, **cond), target)
        return LossTerms(loss, t)

    def check(self, total_steps: int) -> None:
        _, first = self.curriculum(0)
        if first & (first - 1):
            halved = [first >> k for k in range(first.bit_length()) if first >> k > 2]
            logger.warn(f"--start_scales {first} is not a power of two: the stages of the student have "
                        f"{', '.join(map(str, halved))}, 2, 1 steps, which are not all half of those before; "
                        f"{1 << first.bit_length()} or {1 << first.bit_length() - 1} halve exactly")

    def teacher_of(self, teacher: Denoiser, num_scales: int) -> Denoiser:
        """The teacher of a stage. Only the first one is guided: later teachers are students that have learnt it."""
        _, first_scales = self.curriculum(0)
        return teacher if num_scales == first_scales else unguided(teacher)

    def after_step(self, nets: Networks, step: int) -> bool:
        """If the next step has fewer sampling steps, the student becomes the teacher: a new stage begins."""
        (_, scales), (_, next_scales) = self.curriculum(step), self.curriculum(step + 1)
        if next_scales == scales:
            return False
        with th.no_grad():
            copy_tensors(nets.teacher_params, nets.online_params)
        return True
