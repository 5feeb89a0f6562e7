"""KarrasDenoiser: a diffusion with methods for its losses and objectives, as in openai/consistency_models.

The scalings live in `cm.diffusion.denoiser`, the losses in the other modules of this package; here they have the
names and arguments of that repository.

Shapes: N batch, C channels, H and W height and width. Images are in [-1, 1]; noise levels are [N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import Tensor, nn

from cm.diffusion.denoiser import Diffusion
from cm.diffusion.noise_sampling import ScheduleSampler
from cm.objectives.base import GridObjective
from cm.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from cm.objectives.curricula import Curriculum
from cm.objectives.distances import Distance, get_distance
from cm.objectives.edm import EDM, edm_terms
from cm.objectives.progdist import ProgressiveDistillation
from cm.registry import lookup
from cm.types import Batch, LossTerms, Networks, Scalings

__all__ = ["KarrasDenoiser"]

Cond = Mapping[str, Any] | None
ON_GRID: dict[str, type[GridObjective]] = {
    "consistency_distillation": ConsistencyDistillation, "consistency_training": ConsistencyTraining,
    "progdist": ProgressiveDistillation,
}
"""The training methods of that repository."""


class KarrasDenoiser(Diffusion):
    """A `Diffusion` with methods for its losses and objectives; the arguments are the same.

    :raises ValueError: for an unknown loss_norm, and as `Diffusion`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        get_distance(self.loss_norm)

    @property
    def distance(self) -> Distance:
        """The distance that `loss_norm` names, which may be set at any time."""
        return get_distance(self.loss_norm)

    # --- noise levels and scalings: [N] -> [N] ---------------------------------------------------------------------

    def get_sigmas(self, sigmas: Tensor) -> Tensor:
        """The noise levels themselves: in EDM's process the time is the noise level."""
        return sigmas

    def get_scalings(self, sigma: Tensor) -> Scalings:
        """c_skip, c_out, c_in of a diffusion model, EDM's unless `precond` says otherwise."""
        return self.plain.scalings(sigma)

    def get_scalings_for_boundary_condition(self, sigma: Tensor) -> Scalings:
        """A consistency function's c_skip, c_out, c_in."""
        return self.boundary.scalings(sigma)

    # --- objectives ------------------------------------------------------------------------------------------------

    def training_objective(self, schedule_sampler: ScheduleSampler | None = None) -> EDM:
        """The denoising objective, with noise levels from a distribution (by default EDM's lognormal)."""
        return EDM(self.weight) if schedule_sampler is None else EDM(self.weight, schedule_sampler)

    def consistency_objective(self, training_mode: str, ema_scale_fn: Curriculum) -> GridObjective:
        """Consistency distillation, consistency training or progressive distillation.

        :param ema_scale_fn: step -> (target decay rate, num_scales), from `cm.objectives.curricula`.
        :raises ValueError: for any other training_mode.
        """
        return lookup(ON_GRID, training_mode, "training_mode").on_grid(self, ema_scale_fn)

    # --- losses of given batches ------------------------------------------------------------------------------------

    def training_losses(
        self, model: nn.Module, x_start: Tensor, sigmas: Tensor, model_kwargs: Cond = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The denoising loss: `loss`, which is the weighted `mse`, and the unweighted `xs_mse`, [N] each."""
        noise = th.randn_like(x_start) if noise is None else noise
        return as_dict(edm_terms(self.bind(model), x_start, noise, sigmas, self.weight, dict(model_kwargs or {})))

    def consistency_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        num_scales: int,
        model_kwargs: Cond = None,
        target_model: nn.Module | None = None,
        teacher_model: nn.Module | None = None,
        teacher_diffusion: KarrasDenoiser | None = None,
        noise: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The consistency loss `loss` [N]: distillation if there is a teacher, otherwise training.

        :param num_scales: number of noise levels of the grid, at least 2.
        :param teacher_diffusion: the teacher's denoiser; by default this one with EDM's scalings.
        :param indices: [N] int64, which pair of neighbouring levels, 0..num_scales-2; by default random.
        :raises ValueError: without a target_model, and for num_scales below 2.
        """
        mode = "consistency_training" if teacher_model is None else "consistency_distillation"
        nets = self.nets(model, target_model, teacher_model, teacher_diffusion)
        return self.losses_of(mode, nets, x_start, num_scales, model_kwargs, noise, indices)

    def progdist_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        num_scales: int,
        model_kwargs: Cond = None,
        teacher_model: nn.Module | None = None,
        teacher_diffusion: KarrasDenoiser | None = None,
        noise: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of progressive distillation, `loss` [N].

        :param num_scales: the student's number of sampling steps; the teacher does twice as many.
        :param teacher_diffusion: the teacher's denoiser; by default this one with EDM's scalings.
        :param indices: [N] int64, which of the student's steps, 0..num_scales-1; by default random.
        :raises ValueError: without a teacher_model.
        """
        nets = self.nets(model, None, teacher_model, teacher_diffusion)
        return self.losses_of("progdist", nets, x_start, num_scales, model_kwargs, noise, indices)

    def nets(
        self,
        model: nn.Module,
        target_model: nn.Module | None,
        teacher_model: nn.Module | None,
        teacher_diffusion: KarrasDenoiser | None,
    ) -> Networks:
        teacher_diffusion = teacher_diffusion or self.as_teacher()
        return Networks(
            online=self.bind(model),
            online_model=model,
            target=None if target_model is None else self.bind(target_model),
            target_model=target_model,
            teacher=None if teacher_model is None else teacher_diffusion.bind(teacher_model),
            teacher_model=teacher_model,
        )

    def losses_of(
        self, mode: str, nets: Networks, x_start: Tensor, num_scales: int, model_kwargs: Cond, noise: Tensor | None,
        indices: Tensor | None,
    ) -> dict[str, Tensor]:
        """The loss of one batch at a fixed num_scales; noise and indices that are not given are random."""
        objective = self.consistency_objective(mode, lambda step: (0.0, num_scales))
        intervals = objective.intervals(num_scales)
        if noise is None:
            noise = th.randn_like(x_start)
        if indices is None:
            indices = th.randint(0, intervals, (len(x_start),), device=x_start.device)
        return as_dict(objective.terms(nets, Batch(x_start, dict(model_kwargs or {})), noise, indices, num_scales))


def as_dict(terms: LossTerms) -> dict[str, Tensor]:
    return {**terms.logs, "loss": terms.loss}
