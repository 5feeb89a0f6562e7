"""Consistency losses: most few-step methods are one loss, made of five parts.

    weight(t, r)  distance( f(x_t, t),  f'(x_r, r) )        with x_r on a path through x_t, t > r

| part | table | meaning |
|---|---|---|
| pairs | `PAIRS` | how the two noise levels t and r of a sample are drawn |
| path | `PATHS` | how x_t becomes x_r: along a teacher's ODE, or with the same noise |
| distance | `DISTANCES` | the distance between two images |
| weight | `PAIR_WEIGHTS` | the weight of a pair |
| target | `TARGETS` | the weights of f' |

A method is a choice of parts with published settings; flags (--pairs and so on) give other combinations.
Consistency distillation and training are Song et al. 2023 (Consistency Models, arXiv 2303.01469), algorithms 2 and 3.

Shapes: N batch, C channels, H and W height and width. Times are noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch as th
from torch import Tensor

from cm.diffusion.denoiser import Diffusion
from cm.errors import UserError
from cm.objectives.base import TARGET, Companion, GridObjective, curriculum_of
from cm.objectives.distances import get_distance
from cm.objectives.pairs import PAIRS, Pairs, intervals
from cm.objectives.paths import PATHS, image_at
from cm.random_util import SharedDropout
from cm.registry import lookup
from cm.tensors import append_dims, update_ema
from cm.types import Batch, Denoiser, LossTerms, Networks, NoiseSource


def _by_level(weight: Callable[[Tensor], Tensor], t: Tensor, r: Tensor) -> Tensor:
    """--weight_schedule's weight of the noisier level."""
    return weight(t)


def _over_gap(weight: Callable[[Tensor], Tensor], t: Tensor, r: Tensor) -> Tensor:
    """The weight of `_by_level` divided by t - r, so that the size of the loss does not depend on t - r."""
    return weight(t) / (t - r)


PAIR_WEIGHTS = {"level": _by_level, "gap": _over_gap}


@dataclass(frozen=True)
class TargetWeights:
    """The weights of the target.

    :param network: the target's denoiser among the networks of a step; None if it is missing.
    :param companions: networks that it needs besides the online network.
    :param options: the flags that it uses.
    """

    network: Callable[[Networks], Denoiser | None]
    companions: tuple[Companion, ...] = ()
    options: tuple[str, ...] = ()


TARGETS = {
    "ema": TargetWeights(lambda nets: nets.target, (TARGET,), ("target_ema_mode", "start_ema")),
    "online": TargetWeights(lambda nets: nets.online),              # without gradient
}


@dataclass(frozen=True)
class LossParts:
    """The parts of a consistency loss, by their names in the tables; the distance is --loss_norm.

    The fields are flags; an empty flag keeps the method's own part.
    """

    pairs: str
    pair_path: str
    pair_weight: str
    pair_target: str

    def changed_by(self, flags: Mapping[str, Any]) -> LossParts:
        """These parts, replaced by those that flags give."""
        return LossParts(**{field.name: flags.get(field.name) or getattr(self, field.name) for field in fields(self)})

    @property
    def companions(self) -> tuple[Companion, ...]:
        """The networks that the loss needs besides the online network."""
        return (*TARGETS[self.pair_target].companions, *PATHS[self.pair_path].companions)


@dataclass
class Consistency(GridObjective):
    """A consistency loss. A subclass defines its parts, published settings and boundary condition.

    :param chosen: the parts, if they are not the method's own.
    :param drawn: the distribution of the pairs, if it is not the published one.
    :param teacher_solver: see `TeacherPath`.
    """

    parts: ClassVar[LossParts]
    result = "consistency_function"
    few_step = True
    distillation = True
    sampler = "onestep"

    chosen: LossParts | None = None
    drawn: Pairs | None = None
    teacher_solver: str = "heun"

    def __post_init__(self) -> None:
        parts = self.chosen or self.parts
        self.path = lookup(PATHS, parts.pair_path, "pair_path").solved_by(self.teacher_solver)
        self.pair_weight = lookup(PAIR_WEIGHTS, parts.pair_weight, "pair_weight")
        self.target = lookup(TARGETS, parts.pair_target, "pair_target")
        self.pairs = self.drawn or lookup(PAIRS, parts.pairs, "pairs").published(self.levels, self.curriculum)
        self.companions = parts.companions

    # --- from flags ------------------------------------------------------------------------------------------------

    @classmethod
    def from_flags(cls, diffusion: Diffusion, values: Mapping[str, Any]) -> Consistency:
        parts, curriculum = cls.parts.changed_by(values), curriculum_of(values)
        kind = lookup(PAIRS, parts.pairs, "pairs")
        if kind.reaches_zero == cls.distillation:
            fitting = [name for name, each in PAIRS.items() if each.reaches_zero != cls.distillation]
            raise UserError(
                f"--pairs {parts.pairs}: the function that --training_mode {values['training_mode']} trains is the "
                f"identity at {'sigma_min' if cls.distillation else 'noise level 0'}, where these pairs do not end; "
                f"choose {' or '.join(fitting)}"
            )
        distance = get_distance(values["loss_norm"], values["huber_c"] if _is_huber(values) else 0)
        pairs = kind.from_flags(diffusion.noise_levels, curriculum, values)
        solver = values.get("teacher_solver", cls.teacher_solver)
        return cls(curriculum, diffusion.noise_levels, diffusion.weight, distance, parts, pairs, solver)

    @classmethod
    def companions_of(cls, values: Mapping[str, Any]) -> tuple[Companion, ...]:
        return cls.parts.changed_by(values).companions

    @classmethod
    def options_of(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        parts = cls.parts.changed_by(values)
        return (
            "loss_norm", *(["huber_c"] if _is_huber(values) else []), *(field.name for field in fields(LossParts)),
            *PATHS[parts.pair_path].options, *PAIRS[parts.pairs].options, *TARGETS[parts.pair_target].options,
        )

    # --- the loss --------------------------------------------------------------------------------------------------

    def intervals(self, num_scales: int) -> int:
        return intervals(num_scales)

    def __call__(self, nets: Networks, batch: Batch, step: int, rng: NoiseSource) -> LossTerms:
        noise = rng.randn_like(batch.images)
        t, r = self.pairs.draw(step, rng, batch.images)
        return self.compare(nets, batch, noise, t, r)

    def terms(self, nets: Networks, batch: Batch, noise: Tensor, index: Tensor, num_scales: int) -> LossTerms:
        grid = self.levels(num_scales, device=batch.images.device, dtype=batch.images.dtype)
        return self.compare(nets, batch, noise, grid[index], grid[index + 1])

    def compare(self, nets: Networks, batch: Batch, noise: Tensor, t: Tensor, r: Tensor) -> LossTerms:
        """The loss for given noise [N,C,H,W] and levels t > r [N]."""
        f_target = self.target.network(nets)
        if f_target is None:
            raise UserError("consistency losses compare with a target network: give a target_model")
        x0, cond = batch.images, batch.cond
        x_t = x0 + noise * append_dims(t, x0.ndim)
        masks = SharedDropout(x0.device)
        # The passes without gradients first: their memory is free again when the online network keeps its activations.
        with th.no_grad():
            x_r = image_at(self.path, nets, batch, noise, x_t, t, r, self.pairs.reaches_zero)
            with masks:
                target = f_target(x_r, th.where(r > 0, r, t) if self.pairs.reaches_zero else r, **cond)
            if self.pairs.reaches_zero:                             # f(x, 0) = x
                target = th.where(append_dims(r > 0, x0.ndim), target, x_r)
        with masks:
            denoised = nets.online(x_t, t, **cond)
        return LossTerms(self.pair_weight(self.weight, t, r) * self.distance(denoised, target), t)

    # --- over the steps --------------------------------------------------------------------------------------------

    def after_step(self, nets: Networks, step: int) -> bool:
        """Update the target's moving average of the online network, if it has one."""
        if self.target.companions:
            target_ema, _ = self.curriculum(step)
            update_ema(nets.target_params, nets.online_params, target_ema)
        return False

    def check(self, total_steps: int) -> None:
        self.pairs.check(total_steps)

    def least_gap(self, total_steps: int) -> float:
        return self.pairs.least_gap(total_steps)

    def logs(self, step: int) -> dict[str, float]:
        decay = {"target_ema": self.curriculum(step)[0]} if self.target.companions else {}
        return decay | self.pairs.logs(step)


def _is_huber(values: Mapping[str, Any]) -> bool:
    return values.get("loss_norm", "pseudo-huber") == "pseudo-huber"


class ConsistencyDistillation(Consistency):
    """Neighbours on a grid, one step along the teacher's ODE, and a moving average of the weights as the target."""

    parts = LossParts(pairs="grid", pair_path="teacher", pair_weight="level", pair_target="ema")


class ConsistencyTraining(Consistency):
    """Consistency distillation without a teacher: x_r has the noise of x_t."""

    parts = LossParts(pairs="grid", pair_path="noise", pair_weight="level", pair_target="ema")
