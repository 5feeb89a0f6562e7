"""Flow maps: networks that predict the mean velocity from any time s down to any r.

MeanFlow is Geng et al. 2025 (arXiv 2505.13447), equation 6 and algorithm 1. AlphaFlow is Zhang et al. 2025 (arXiv
2510.20771), which needs no derivative: it is flow matching at alpha = 1, and MeanFlow as alpha tends to 0. They are not
subclasses of `Consistency`: the network is conditioned on both times of a pair, and the target is a velocity.
They share the path with consistency losses.

On the linear clock, see `cm.diffusion.linear_clock`. Shapes: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar, NamedTuple

import torch as th
from torch import Tensor

from cm.diffusion import linear_clock
from cm.diffusion.denoiser import Diffusion
from cm.errors import UserError
from cm.networks.layers import without_autocast
from cm.objectives import tangents
from cm.objectives.base import length_of
from cm.objectives.paths import PathObjective
from cm.random_util import SharedDropout
from cm.tensors import append_dims
from cm.types import Batch, LossTerms, Networks, NoiseSource

STEEPNESS = 25.0                                            # of AlphaFlow's sigmoid over the training


class Point(NamedTuple):
    """The start and the end of a flow map's step, and the velocity of the path at the start."""

    y: Tensor                                               # [N,C,H,W]
    s: Tensor                                               # [N]
    r: Tensor                                               # [N], at most s
    v: Tensor                                               # [N,C,H,W]


@dataclass
class FlowMap(PathObjective):
    """|residual|^2 / sg(|residual|^2 + adapt_e)^adapt_p with the residual of `residual`, norms over a sample.

    :param p_mean, p_std: mean and standard deviation of ln sigma at s.
    :param r_mean, r_std: mean and standard deviation of ln sigma at r, which is limited to s.
    :param equal_share: share of the samples with r = s, for which the flow map learns the velocity of the path.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"p_mean": -0.6, "p_std": 1.6}
    options: ClassVar[tuple[str, ...]] = (
        "pair_path", "p_mean", "p_std", "r_mean", "r_std", "equal_share", "adapt_p", "adapt_e",
    )
    usual_path = "noise"
    second_time = True
    result = "flow_map"
    sampler = "flowmap"

    path: str = "noise"
    p_mean: float = -0.6
    p_std: float = 1.6
    r_mean: float = -4.0
    r_std: float = 1.6
    equal_share: float = 0.25
    adapt_p: float = 0.75
    adapt_e: float = 1e-3

    @classmethod
    def from_flags(cls, diffusion: Diffusion, values: Mapping[str, Any]) -> FlowMap:
        if diffusion.precond != "edm":
            raise UserError(f"--precond {diffusion.precond}: flow maps need EDM's scalings, --precond edm")
        return cls(diffusion, cls.path_of(values), **cls.settings_of(values))

    @classmethod
    def settings_of(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that are options of this objective, by name."""
        return {name: values[name] for name in cls.options if name != "pair_path"}

    @abstractmethod
    def residual(self, nets: Networks, batch: Batch, at: Point, step: int, masks: SharedDropout) -> Tensor:
        """u(y, s, r) minus its target, [N,C,H,W]; the gradient flows through u alone."""

    def __call__(self, nets: Networks, batch: Batch, step: int, rng: NoiseSource) -> LossTerms:
        noise = rng.randn_like(batch.images)
        s, r = self.times(rng, batch.images)
        at = self.point(nets, batch, noise, s, r)
        squared = self.residual(nets, batch, at, step, SharedDropout(noise.device)).square().flatten(1).sum(1)
        loss = squared / (squared.detach() + self.adapt_e) ** self.adapt_p
        return LossTerms(loss, linear_clock.level(s), {"mse": squared.detach() / noise[0].numel()})

    def times(self, rng: NoiseSource, like: Tensor) -> tuple[Tensor, Tensor]:
        """s >= r of each sample, within the noise levels of the run: [N] each."""
        draws = [rng.randn(len(like), dtype=th.float64, device=like.device) for _ in range(2)]
        is_equal = rng.rand(len(like), dtype=th.float64, device=like.device) < self.equal_share
        settings = ((self.p_mean, self.p_std), (self.r_mean, self.r_std))
        levels = [(z * std + mean).exp() for z, (mean, std) in zip(draws, settings)]
        s, r = (linear_clock.time(each.clamp(self.diffusion.sigma_min, self.diffusion.sigma_max)) for each in levels)
        return s.to(like.dtype), th.where(is_equal, s, th.minimum(s, r)).to(like.dtype)

    @th.no_grad()
    def point(self, nets: Networks, batch: Batch, noise: Tensor, s: Tensor, r: Tensor) -> Point:
        """The images with their noise at s, and the velocity of the path there, noise - data."""
        wide = append_dims(s, noise.ndim)
        y = (1 - wide) * batch.images + wide * noise
        with without_autocast(y.device):
            data, direction = self.velocity_path.ends(nets, batch, noise, y / (1 - wide), linear_clock.level(s))
        return Point(y, s, r, direction - data)

    @staticmethod
    def velocity(nets: Networks, batch: Batch, y: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """u(y, s, r) of the online network."""
        x = y / append_dims(1 - s, y.ndim)
        denoised = nets.online(x, linear_clock.level(s), gap=s - r, **batch.cond)
        return linear_clock.mean_velocity(y, denoised, s)


class MeanFlow(FlowMap):
    """The residual u - sg(v - (s - r) du/ds), with the derivative along (v, 1, 0) in (y, s, r)."""

    @classmethod
    def from_flags(cls, diffusion: Diffusion, values: Mapping[str, Any]) -> FlowMap:
        tangents.check_flags(diffusion, values)
        return super().from_flags(diffusion, values)

    def residual(self, nets: Networks, batch: Batch, at: Point, step: int, masks: SharedDropout) -> Tensor:
        y, s, r, v = at
        u = linear_clock.mean_velocity_of(self.diffusion, nets.online_model, batch.cond)
        _, change = tangents.derivative(lambda y, s: u(y, s, r), (y, s), (v, th.ones_like(s)), masks)
        target = v - append_dims(s - r, y.ndim) * change
        with masks:
            return self.velocity(nets, batch, y, s, r) - target


@dataclass
class AlphaFlow(FlowMap):
    """The residual (u - sg(alpha v + (1 - alpha) u(y_m, m, r))) / alpha, where m = s - alpha (s - r) and y_m is
    y - (s - m) v.

    Up to O(alpha), it equals MeanFlow's residual. Its gradient is that of u, as there: the gradient of its square is
    that of the paper's |u - target|^2 / alpha. alpha falls from 1 along a sigmoid during training, and stays above
    alpha_end.

    :param alpha_steps: number of steps over which alpha falls.
    """

    options = (*FlowMap.options, "alpha_end", "alpha_steps")

    alpha_end: float = 0.005
    alpha_steps: int = 600_000

    @classmethod
    def settings_of(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return super().settings_of(values) | {"alpha_steps": values["alpha_steps"] or length_of(values)}

    def alpha(self, step: int) -> float:
        """1 at the start, alpha_end at the end."""
        return max(self.alpha_end, 1 / (1 + exp(STEEPNESS * (step / self.alpha_steps - 0.5))))

    def residual(self, nets: Networks, batch: Batch, at: Point, step: int, masks: SharedDropout) -> Tensor:
        (y, s, r, v), alpha = at, self.alpha(step)
        m = s - alpha * (s - r)
        with th.no_grad(), masks:
            later = self.velocity(nets, batch, y - append_dims(s - m, y.ndim) * v, m, r)
        target = alpha * v + (1 - alpha) * later
        with masks:
            u = self.velocity(nets, batch, y, s, r)
        return (u.detach() - target) / alpha + (u - u.detach())

    def least_gap(self, total_steps: int) -> float:
        """alpha: by about this share two velocities differ, and by it their difference is divided."""
        return self.alpha(total_steps - 1)

    def logs(self, step: int) -> dict[str, float]:
        return {"alpha": self.alpha(step)}
