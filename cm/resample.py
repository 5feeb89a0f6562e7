"""openai/consistency_models' `cm.resample`: the noise distributions of training.

A compatibility module: they are those of `cm.diffusion.noise_sampling`, here with `weights()`, with a diffusion in
the place of a grid, and with losses that are gathered from all ranks. `sample` returns noise levels where there is a
grid; the original returns their indices, which its losses then take for noise levels.

Shapes: N batch, K noise levels of a grid (`diffusion.num_timesteps`, 40).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch import Tensor
from torch.types import Device

from cm.diffusion import noise_sampling
from cm.diffusion.noise_sampling import Draw
from cm.distributed import setup as dist
from cm.types import NoiseSource

__all__ = [
    "LogNormalSampler", "LossAwareSampler", "LossSecondMomentResampler", "ScheduleSampler", "UniformSampler",
    "create_named_schedule_sampler",
]


class ScheduleSampler(noise_sampling.ScheduleSampler):
    """A distribution on K levels, in proportion to `weights`; the loss weights are 1 / (K p)."""

    @abstractmethod
    def weights(self) -> NDArray[np.floating]:
        """How likely each level is: [K], positive, of any sum."""

    def draw(self, rng: NoiseSource, n: int, device: Device) -> Draw:
        """n levels by their indices; laws on a grid return its noise levels instead."""
        weights = th.as_tensor(self.weights(), dtype=th.float64, device=device)
        p = weights / weights.sum()
        u = rng.rand(n, device=device).double()
        index = th.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        return Draw(index, (1 / (len(p) * p))[index].float(), index)


class UniformSampler(noise_sampling.UniformSampler, ScheduleSampler):
    """Every noise level of a grid is as likely as every other.

    :param diffusion: a KarrasDenoiser, or the grid itself [K].
    """

    def __init__(self, diffusion: Any):
        super().__init__(_grid_of(diffusion))

    def weights(self) -> NDArray[np.floating]:
        """[K] ones."""
        return np.ones(len(self.sigmas))


class LossAwareSampler(ScheduleSampler):
    """A distribution that follows the losses of the levels."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Take in the losses of all ranks. All ranks must call it together; their batches may differ in size.

        :param local_ts: [N], what `sample` returned on this rank: noise levels, or indices where they are integers.
        :param local_losses: [N], unweighted.
        """
        every = dist.all_gather_object((local_ts.detach().cpu(), local_losses.detach().cpu()))
        ts, losses = (th.cat(parts).tolist() for parts in zip(*every))
        self.update_with_all_losses(ts, losses)

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[float], losses: Sequence[float]) -> None:
        """Take in losses, the same on every rank; ts as in `update_with_local_losses`."""


class LossSecondMomentResampler(noise_sampling.LossSecondMomentResampler, LossAwareSampler):
    """Levels in proportion to the root mean square of their last losses, once each has enough of them.

    :param diffusion: a KarrasDenoiser, or the grid itself [K].
    :param history_per_term: losses that are remembered of each level.
    :param uniform_prob: share of the draws that stays uniform.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__(_grid_of(diffusion), history_per_term, uniform_prob)

    def weights(self) -> NDArray[np.floating]:
        """[K]: ones until every level has its losses, then probabilities."""
        p = self.probabilities().numpy()
        is_warm = bool((self.counts >= self.losses.shape[1]).all())
        return p if is_warm else np.ones_like(p)

    def update_with_all_losses(self, ts: Sequence[float], losses: Sequence[float]) -> None:
        """Remember losses at noise levels of the grid, or at their indices if `ts` holds integers."""
        places = th.as_tensor(ts)
        indices = self.index_of(places) if places.is_floating_point() else places
        self.update_with_losses(indices, th.as_tensor(losses))


class LogNormalSampler(noise_sampling.LogNormalSampler):
    """ln sigma ~ N(p_mean, p_std^2).

    :param even: one noise level from each of as many equally likely intervals as the ranks have samples together,
        which lowers the variance of the loss; each rank must ask for as many as the others.
    """

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2, even: bool = False):
        super().__init__(p_mean, p_std)
        self.even = even

    def draw(self, rng: NoiseSource, n: int, device: Device) -> Draw:
        """n noise levels."""
        if not self.even:
            return super().draw(rng, n, device)
        places = n * dist.get_rank() + th.arange(n, device=device)
        u = (places + rng.rand(n, device=device)).double() / (n * dist.get_world_size())
        sigma = (th.special.ndtri(u) * self.p_std + self.p_mean).exp().float()
        return Draw(sigma, th.ones_like(sigma), None)

    def sample(self, bs: int, device: Device) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Noise levels and weights, [bs] each, from torch's global generator."""
        return super().sample(bs, device)


NAMED = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentResampler,
    "lognormal": lambda diffusion: LogNormalSampler(),
}


def create_named_schedule_sampler(name: str, diffusion: Any) -> noise_sampling.ScheduleSampler:
    """The distribution `name`: uniform, loss-second-moment, lognormal, or another of `SCHEDULE_SAMPLERS`.

    :raises UserError: for an unknown name; the message lists the choices.
    """
    if name in NAMED:
        return NAMED[name](diffusion)
    return noise_sampling.create_named_schedule_sampler(name, diffusion)


def _grid_of(diffusion: Any) -> Any:
    """The noise levels [K] of a KarrasDenoiser; anything else is taken for a grid."""
    return diffusion.noise_levels(diffusion.num_timesteps) if hasattr(diffusion, "noise_levels") else diffusion
