"""Distributions of the two noise levels t > r of a sample that a consistency loss compares.

Sources: `grid` is Song et al. 2023 (Consistency Models, arXiv 2303.01469), algorithms 2 and 3; `lognormal-grid` is Song
and Dhariwal 2023 (iCT, arXiv 2310.14189), section 3.5; `shrinking` is Geng et al. 2024 (ECT, arXiv 2406.14548), section
3.2 and appendix A.

Shapes: N batch. All levels are drawn in float64 from a sample's own random numbers, so a draw does not depend on ranks
and microbatches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.objectives.base import length_of
from cm.objectives.curricula import Curriculum
from cm.types import NoiseSource

Levels = Callable[..., Tensor]                                      # (n, device, dtype) -> n falling levels [n]


class Pairs(ABC):
    """A distribution of pairs of noise levels, which may change over the steps."""

    options: ClassVar[tuple[str, ...]] = ()
    """The flags that it uses."""
    reaches_zero: ClassVar[bool] = False
    """Whether r may be 0, the image itself, which needs a function with D(x, 0) = x; else r >= sigma_min."""

    @classmethod
    @abstractmethod
    def from_flags(cls, levels: Levels, curriculum: Curriculum, values: Mapping[str, Any]) -> Pairs:
        """The distribution that resolved flags describe.

        :param levels: makes the Karras grid of the run.
        :param curriculum: step -> (target decay rate, number of levels of the grid).
        """

    @classmethod
    @abstractmethod
    def published(cls, levels: Levels, curriculum: Curriculum) -> Pairs:
        """The distribution with the settings of its paper."""

    @abstractmethod
    def draw(self, step: int, rng: NoiseSource, like: Tensor) -> tuple[Tensor, Tensor]:
        """t and r [N] for the N images `like`, in their dtype and on their device."""

    def check(self, total_steps: int) -> None:
        """Check at the start whether every step of the run is possible.

        :raises UserError: if one is not.
        """
        return None

    def least_gap(self, total_steps: int) -> float:
        """1 - r / t of a typical pair at the end of training, if pairs come close."""
        return 1.0

    def logs(self, step: int) -> dict[str, float]:
        """Values for the log row of a step."""
        return {}


@dataclass(frozen=True)
class GridPairs(Pairs):
    """Neighbours on a Karras grid; all of its N - 1 intervals are equally likely."""

    options: ClassVar[tuple[str, ...]] = ("scale_mode", "start_scales", "end_scales", "distill_steps_per_iter",
                                          "stage_steps", "stage_kimg")

    levels: Levels
    curriculum: Curriculum

    @classmethod
    def from_flags(cls, levels: Levels, curriculum: Curriculum, values: Mapping[str, Any]) -> Pairs:
        return cls(levels, curriculum)

    @classmethod
    def published(cls, levels: Levels, curriculum: Curriculum) -> Pairs:
        return cls(levels, curriculum)

    def draw(self, step: int, rng: NoiseSource, like: Tensor) -> tuple[Tensor, Tensor]:
        _, num_scales = self.curriculum(step)
        index = self.index(num_scales, rng, like)                   # 0 is the noisiest
        grid = self.levels(num_scales, device=like.device, dtype=like.dtype)
        return grid[index], grid[index + 1]

    def index(self, num_scales: int, rng: NoiseSource, like: Tensor) -> Tensor:
        """The interval of each sample, 0..num_scales-2: [N] int64."""
        return rng.randint(0, intervals(num_scales), (len(like),), device=like.device)

    def check(self, total_steps: int) -> None:
        for step in (0, total_steps - 1):                   # an error here, not hours later in the curriculum
            intervals(self.curriculum(step)[1])

    def least_gap(self, total_steps: int) -> float:
        grid = self.levels(self.curriculum(total_steps - 1)[1], device="cpu", dtype=th.float64)
        return (1 - grid[1:] / grid[:-1]).median().item()

    def logs(self, step: int) -> dict[str, float]:
        return {"num_scales": self.curriculum(step)[1]}


def intervals(num_scales: int) -> int:
    """The number of intervals of a grid of `num_scales` levels.

    :raises UserError: if there is none.
    """
    if num_scales < 2:
        raise UserError(
            f"consistency losses compare neighbouring noise levels: num_scales must be at least 2, got {num_scales}"
        )
    return num_scales - 1


@dataclass(frozen=True)
class LognormalGridPairs(GridPairs):
    """Neighbours on a Karras grid; an interval has the probability that ln sigma ~ N(p_mean, p_std^2) falls into it.

    iCT, section 3.5: p_i ~ erf((ln s_{i+1} - P) / (sqrt(2) S)) - erf((ln s_i - P) / (sqrt(2) S)).
    """

    options: ClassVar[tuple[str, ...]] = (*GridPairs.options, "p_mean", "p_std")

    p_mean: float = -1.1
    p_std: float = 2.0

    def __post_init__(self) -> None:
        if not self.p_std > 0:
            raise UserError(f"--p_std {self.p_std:g} is a standard deviation: it must be positive, such as 2")

    @classmethod
    def from_flags(cls, levels: Levels, curriculum: Curriculum, values: Mapping[str, Any]) -> Pairs:
        return cls(levels, curriculum, values["p_mean"], values["p_std"])

    def probabilities(self, num_scales: int) -> Tensor:
        """The probability of each interval, the noisiest first: [num_scales-1] float64."""
        grid = self.levels(num_scales, device="cpu", dtype=th.float64)
        below = th.erf((grid.log() - self.p_mean) / (math.sqrt(2) * self.p_std))
        p = below[:-1] - below[1:]
        return p / p.sum()

    def index(self, num_scales: int, rng: NoiseSource, like: Tensor) -> Tensor:
        """Inverts the distribution function, in float64: float32 is too coarse for 1280 intervals."""
        intervals(num_scales)
        cumulative = self.probabilities(num_scales).cumsum(0).to(like.device, non_blocking=True)
        u = rng.rand(len(like), dtype=th.float64, device=like.device)
        return th.searchsorted(cumulative, u, right=True).clamp(max=num_scales - 2)


@dataclass(frozen=True)
class ShrinkingPairs(Pairs):
    """ln t ~ N(p_mean, p_std^2), and r as a share of t that grows from stage to stage.

    ECT, equation 11: r = max(0, t (1 - n(t) / q^(a+1))) in stage a = 0, 1, ..., where n(t) = 1 + k sigmoid(-b t). In
    the first stages of a small q many r are 0, and the loss is that of a denoiser.

    :param q: factor by which 1 - r/t falls from stage to stage.
    :param stages: number of stages.
    :param stage_steps: steps of a stage; the last stage lasts until the end.
    """

    options: ClassVar[tuple[str, ...]] = ("p_mean", "p_std", "shrink_q", "shrink_k", "shrink_b", "stages",
                                          "stage_steps", "stage_kimg")
    reaches_zero: ClassVar[bool] = True

    p_mean: float = -1.1
    p_std: float = 2.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stages: int = 8
    stage_steps: int = 10_000

    @classmethod
    def from_flags(cls, levels: Levels, curriculum: Curriculum, values: Mapping[str, Any]) -> Pairs:
        stages = values["stages"]
        steps = values["stage_steps"] or math.ceil(length_of(values) / stages)
        return cls(values["p_mean"], values["p_std"], values["shrink_q"], values["shrink_k"], values["shrink_b"],
                   stages, steps)

    @classmethod
    def published(cls, levels: Levels, curriculum: Curriculum) -> Pairs:
        return cls()

    def __post_init__(self) -> None:
        if not self.q > 1:
            raise UserError(f"--shrink_q {self.q:g}: 1 - r/t falls by this factor from stage to stage, so it must be "
                            "above 1; published values are 2 and 256")

    def stage(self, step: int) -> int:
        """a, 0 for the first."""
        return min(step // self.stage_steps, self.stages - 1)

    def lower(self, t: Tensor, stage: int) -> Tensor:
        """r at levels t: [N] -> [N]."""
        n = 1 + self.k * th.sigmoid(-self.b * t)
        return (t * (1 - n / self.q ** (stage + 1))).clamp(min=0)

    def draw(self, step: int, rng: NoiseSource, like: Tensor) -> tuple[Tensor, Tensor]:
        z = rng.randn(len(like), dtype=th.float64, device=like.device)
        t = (z * self.p_std + self.p_mean).exp()
        return t.to(like.dtype), self.lower(t, self.stage(step)).to(like.dtype)

    def least_gap(self, total_steps: int) -> float:
        t = th.tensor([self.p_mean], dtype=th.float64).exp()
        return (1 - self.lower(t, self.stage(total_steps - 1)) / t).item()

    def logs(self, step: int) -> dict[str, float]:
        return {"stage": self.stage(step)}


PAIRS: dict[str, type[Pairs]] = {
    "grid": GridPairs,
    "lognormal-grid": LognormalGridPairs,
    "shrinking": ShrinkingPairs,
}
