"""The interface of objectives: the loss, the networks it needs besides the trained one, and the kind of its result.

The training loop names no objective. It creates the companions that an objective declares, passes them to the loss as
`Networks`, steps the optimizers of those that are trained, and saves those that change in checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from cm.diffusion.denoiser import Diffusion
from cm.distributed import setup as dist
from cm.objectives.curricula import Curriculum, doublings, ema_and_scales
from cm.objectives.distances import Distance, get_distance
from cm.objectives.lpips import check_lpips_channels, prepare_lpips
from cm.types import Batch, LossHistory, LossTerms, Networks, NoiseSource, Result

ONLINE = "online"
"""The role of the main network of a run: samples are drawn from its averages."""
ENDLESS = 600_000
"""The number of steps of a run without a given end, as in the published commands."""


@dataclass(frozen=True)
class Companion:
    """A network that an objective needs besides the online one; it has the online network's architecture.

    :param name: its role, and the name of its files in a checkpoint; it ends in "_model".
    :param origin: the source of its initial weights: "online", a copy of the online network at the start; "teacher",
        the file that --teacher_model_path names; "new", random weights.
    :param changes: "never": it is frozen and not saved in checkpoints. "by_objective": `after_step` changes its
        parameters. "trained": it has an optimizer and takes the steps that `updates` lists.
    :param distillation: whether it is scaled as a consistency function, with D(x, sigma_min) = x.
    """

    name: str
    origin: Literal["online", "teacher", "new"]
    changes: Literal["never", "by_objective", "trained"]
    distillation: bool = False


TARGET = Companion("target_model", "online", "by_objective", distillation=True)
"""A slowly moving average of the online network, with which its outputs are compared."""
TEACHER = Companion("teacher_model", "teacher", "never")
"""A frozen diffusion model."""


class Objective(ABC):
    """A training method. A subclass is one file and one line in the table of `cm.objectives`."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Flags -> their published values, used for flags that the user does not set."""
    options: ClassVar[tuple[str, ...]] = ()
    """The flags that this objective uses, and unrelated objectives do not."""
    companions: tuple[Companion, ...] = ()
    updates: ClassVar[Mapping[str, int]] = {ONLINE: 1}
    """One iteration: the number of steps of each trained network, one network after the other, each on a new batch."""
    distillation: ClassVar[bool] = False
    """Whether the result is scaled so that D(x, sigma_min) = x, a consistency function that ends at sigma_min."""
    few_step: ClassVar[bool] = False
    """Whether the result maps any noise level to an image in one evaluation; a denoiser does not."""
    second_time: ClassVar[bool] = False
    """Whether the network is also conditioned on where its step ends: a flow map."""
    needs_slow_clock: ClassVar[bool] = False
    """Whether the loss depends on the slope of the network in its noise label; see `cm.setup.clock`."""
    full_precision_passes: ClassVar[bool] = False
    """Whether parts of the loss run networks in float32, whatever the precision of the run. If none does, a bf16 run
    stores companions without gradients in the dtype to which autocast would cast them at every pass."""
    has_stages: ClassVar[bool] = False
    """Whether `after_step` may ask for a fresh optimizer and fresh averages."""
    result: ClassVar[Result] = "denoiser"
    """The kind of the trained network; a sampler lists the kinds that it can sample."""
    sampler: ClassVar[str] = "heun"
    """The default sampler of the result."""

    @classmethod
    @abstractmethod
    def from_flags(cls, diffusion: Diffusion, values: Mapping[str, Any]) -> Objective:
        """The objective that resolved flags describe.

        :param diffusion: the scalings of the online network.
        :raises UserError: for values that cannot be combined.
        """

    @abstractmethod
    def __call__(self, nets: Networks, batch: Batch, step: int, rng: NoiseSource) -> LossTerms:
        """The loss of the network that `trains` names. It must not change any state: a pass may be discarded."""

    @classmethod
    def companions_of(cls, values: Mapping[str, Any]) -> tuple[Companion, ...]:
        """The companions of the objective that resolved flags describe."""
        return cls.companions

    @classmethod
    def options_of(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The subset of `options` that the objective described by these flags uses; missing flags have defaults."""
        return cls.options

    @classmethod
    def prepare(cls, values: Mapping[str, Any]) -> None:
        """Find or download the files that the objective needs, before the run creates its folder; on every rank."""
        return None

    @classmethod
    def distance_of(cls, values: Mapping[str, Any]) -> str:
        """The name of the distance between two images that the flags select, see `distances`."""
        return "l2"

    def trains(self, step: int) -> str:
        """The role of the network that takes an optimizer step at `step`."""
        place = step % sum(self.updates.values())
        for role, steps in self.updates.items():
            if place < steps:
                return role
            place -= steps
        raise AssertionError("an iteration has at least one step")

    def after_step(self, nets: Networks, step: int) -> bool:
        """Update companions; True asks the loop for a fresh optimizer and fresh averages.

        Called after every step, even if it was skipped because its gradients overflowed: stages count steps.
        """
        return False

    def check(self, total_steps: int) -> None:
        """Check at the start whether every step of the run is possible.

        :raises UserError: if one is not.
        """
        return None

    def least_gap(self, total_steps: int) -> float:
        """How close the levels come that the loss compares, at the end of training: a share of the noisier; 1: none."""
        return 1.0

    def logs(self, step: int) -> dict[str, float]:
        """Values for the log row of a step, besides the loss."""
        return {}

    @property
    def history(self) -> LossHistory | None:
        """The object that learns from the losses of all ranks, if the objective has one."""
        return None

    @property
    def references(self) -> int:
        """The number of reference images that every batch must contain."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs besides networks and history, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        return None


@dataclass
class GridObjective(Objective):
    """A loss over one random interval of a grid of noise levels; the curriculum sets the number of levels.

    :param curriculum: step -> (target decay rate, num_scales).
    :param levels: (n, device, dtype) -> n decreasing noise levels.
    :param weight: the loss weight at noise levels, [N] -> [N].
    :param distance: two batches of images -> [N].
    """

    options: ClassVar[tuple[str, ...]] = (
        "loss_norm", "target_ema_mode", "scale_mode", "start_ema", "start_scales", "end_scales",
        "distill_steps_per_iter",
    )

    curriculum: Curriculum
    levels: Callable[..., Tensor]
    weight: Callable[[Tensor], Tensor]
    distance: Distance

    @classmethod
    def from_flags(cls, diffusion: Diffusion, values: Mapping[str, Any]) -> GridObjective:
        return cls.on_grid(diffusion, curriculum_of(values))

    @classmethod
    def prepare(cls, values: Mapping[str, Any]) -> None:
        if values["loss_norm"] == "lpips":
            check_lpips_channels(values.get("channels", 3))
            dist.on_main(prepare_lpips)

    @classmethod
    def distance_of(cls, values: Mapping[str, Any]) -> str:
        return values["loss_norm"]

    @classmethod
    def on_grid(cls, diffusion: Diffusion, curriculum: Curriculum) -> GridObjective:
        """The objective with the noise levels, the loss weights and the distance of a diffusion."""
        return cls(curriculum, diffusion.noise_levels, diffusion.weight, get_distance(diffusion.loss_norm))

    @abstractmethod
    def intervals(self, num_scales: int) -> int:
        """The number of intervals that the loss is over.

        :raises UserError: if there is none for this num_scales.
        """

    @abstractmethod
    def terms(self, nets: Networks, batch: Batch, noise: Tensor, index: Tensor, num_scales: int) -> LossTerms:
        """The loss for given noise [N,C,H,W] and intervals `index` [N]; interval 0 is the noisiest."""

    def __call__(self, nets: Networks, batch: Batch, step: int, rng: NoiseSource) -> LossTerms:
        _, num_scales = self.curriculum(step)
        noise = rng.randn_like(batch.images)
        index = rng.randint(0, self.intervals(num_scales), (len(batch),), device=noise.device)
        return self.terms(nets, batch, noise, index, num_scales)

    def check(self, total_steps: int) -> None:
        for step in (0, total_steps - 1):                   # an error here, not hours later in the curriculum
            self.intervals(self.curriculum(step)[1])

    def logs(self, step: int) -> dict[str, float]:
        target_ema, num_scales = self.curriculum(step)
        return {"target_ema": target_ema, "num_scales": num_scales}


def last_step(total_training_steps: int, lr_anneal_steps: int) -> int:
    """Where training ends, and what a schedule has to fit into: never after the learning rate has reached 0."""
    total = total_training_steps or lr_anneal_steps or ENDLESS
    return min(total, lr_anneal_steps) if lr_anneal_steps else total


def length_of(values: Mapping[str, Any]) -> int:
    """The number of steps of the run that resolved flags describe."""
    return last_step(values["total_training_steps"], values.get("lr_anneal_steps", 0))


def curriculum_of(values: Mapping[str, Any]) -> Curriculum:
    """The curriculum that resolved flags describe.

    :raises UserError: for values that cannot be combined.
    """
    total = length_of(values)
    if values["scale_mode"] == "doubling" and values["stage_steps"]:
        total = values["stage_steps"] * doublings(values["start_scales"], values["end_scales"])
    return ema_and_scales(
        target_ema_mode=values["target_ema_mode"],
        start_ema=values["start_ema"],
        scale_mode=values["scale_mode"],
        start_scales=values["start_scales"],
        end_scales=values["end_scales"],
        total_steps=total,
        distill_steps_per_iter=values["distill_steps_per_iter"],
    )


def roles(companions: Sequence[Companion], changes: str) -> list[str]:
    """The names of the companions that change in this way."""
    return [each.name for each in companions if each.changes == changes]
