"""Laws from which training draws its noise levels.

A law draws sigma [N] together with a weight [N] for each sample's loss: where the law deliberately differs from the
distribution that the loss is meant for, the weight makes up for it, so the expected loss does not depend on the law.

Shapes: N batch, K noise levels of a grid, M remembered losses per level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th
from torch import Tensor

from cm.diffusion import ddpm_schedule
from cm.diffusion.schedules import VE_LEVELS, VP, VPLaw, iddpm_levels
from cm.registry import lookup
from cm.types import NoiseSource


class Draw(NamedTuple):
    sigma: Tensor                                                   # [N]
    weight: Tensor                                                  # [N]
    index: Tensor | None                                            # [N] int64 into the grid of the law, if it has one


class ScheduleSampler(ABC):
    """A law of noise levels."""

    @abstractmethod
    def draw(self, rng: NoiseSource, n: int, device: Any) -> Draw:
        """n noise levels; row i belongs to sample i of the batch."""

    def sample(self, batch_size: int, device: Any) -> tuple[Tensor, Tensor]:
        """Noise levels and weights from torch's global generator; guided-diffusion's call."""
        sigma, weight, _ = self.draw(th, batch_size, device)
        return sigma, weight


class LogNormalSampler(ScheduleSampler):
    """ln sigma ~ N(p_mean, p_std^2): Karras et al. 2022 (EDM, arXiv 2206.00364), table 1."""

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2):
        if not p_std > 0:
            raise ValueError(f"p_std is a standard deviation and must be positive, got {p_std}")
        self.p_mean = p_mean
        self.p_std = p_std

    def draw(self, rng: NoiseSource, n: int, device: Any) -> Draw:
        sigma = (rng.randn(n, device=device) * self.p_std + self.p_mean).exp()
        return Draw(sigma, th.ones_like(sigma), None)


@dataclass(frozen=True)
class VPSampler(ScheduleSampler):
    """Times of the variance-preserving process, uniform between its ends: Song et al. 2021 (arXiv 2011.13456)."""

    law: VPLaw = VP

    def draw(self, rng: NoiseSource, n: int, device: Any) -> Draw:
        first, last = self.law.ends
        sigma = self.law.sigma(first + (last - first) * rng.rand(n, device=device))
        return Draw(sigma, th.ones_like(sigma), None)


@dataclass(frozen=True)
class VESampler(ScheduleSampler):
    """ln sigma uniform between two levels: the variance-exploding process of Song et al. 2021 (arXiv 2011.13456)."""

    levels: tuple[float, float] = VE_LEVELS

    def draw(self, rng: NoiseSource, n: int, device: Any) -> Draw:
        lowest, highest = self.levels
        sigma = lowest * (highest / lowest) ** rng.rand(n, device=device)
        return Draw(sigma, th.ones_like(sigma), None)


class UniformSampler(ScheduleSampler):
    """Every noise level of a grid is as likely as every other.

    :param sigmas: the grid [K].
    """

    def __init__(self, sigmas: Tensor | Sequence[float]):
        self.sigmas = as_grid(sigmas)

    def draw(self, rng: NoiseSource, n: int, device: Any) -> Draw:
        index = rng.randint(0, len(self.sigmas), (n,), device=device)
        sigma = self.sigmas.to(device)[index]
        return Draw(sigma, th.ones_like(sigma), index)


class IDDPMSampler(UniformSampler):
    """Every step of the cosine process is as likely as every other: Nichol and Dhariwal 2021 (arXiv 2102.09672)."""

    def __init__(self) -> None:
        super().__init__(iddpm_levels())


class DDPMSampler(UniformSampler):
    """Every timestep of DDPM is as likely as every other: Ho et al. 2020 (arXiv 2006.11239), algorithm 1."""

    def __init__(self) -> None:
        super().__init__(ddpm_schedule.sigmas())


class LossSecondMomentResampler(ScheduleSampler):
    """Levels of a grid in proportion to the root mean square of their last M losses, unbiased by weights.

    Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 18. Until every level has M losses the law is uniform.

    :param sigmas: the grid [K].
    :param history_per_term: M.
    :param uniform_prob: share of the draws that stays uniform, so that no level is forgotten.
    """

    def __init__(self, sigmas: Tensor | Sequence[float], history_per_term: int = 10, uniform_prob: float = 0.001):
        if history_per_term < 1:
            raise ValueError(f"history_per_term must be at least 1, got {history_per_term}")
        if not 0 <= uniform_prob <= 1:
            raise ValueError(f"uniform_prob is a probability, got {uniform_prob}")
        self.sigmas = as_grid(sigmas)
        self.uniform_prob = uniform_prob
        self.losses = th.zeros(len(self.sigmas), history_per_term, dtype=th.float64)    # [K,M], a ring per level
        self.counts = th.zeros(len(self.sigmas), dtype=th.int64)                        # [K], losses ever seen

    def probabilities(self) -> Tensor:
        """The law: [K] float64."""
        levels, memory = self.losses.shape
        uniform = th.full((levels,), 1 / levels, dtype=th.float64)
        rms = self.losses.square().mean(1).sqrt()
        if (self.counts < memory).any() or rms.sum() == 0:
            return uniform
        return (1 - self.uniform_prob) * rms / rms.sum() + self.uniform_prob * uniform

    def draw(self, rng: NoiseSource, n: int, device: Any) -> Draw:
        p = self.probabilities().to(device)
        u = rng.rand(n, device=device).double()
        index = th.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)       # the inverse of the law
        sigma = self.sigmas.to(device)[index]
        return Draw(sigma, (1 / (len(p) * p))[index].to(sigma.dtype), index)

    def index_of(self, sigma: Tensor) -> Tensor:
        """Which level of the grid each noise level is: [N] -> [N] int64."""
        return (sigma[:, None] - self.sigmas.to(sigma.device)).abs().argmin(1)

    def update_with_losses(self, indices: Tensor, losses: Tensor) -> None:
        """Remember unweighted losses [N] at the levels `indices` [N].

        Only the tensors given are looked at: on several ranks, gather them first and give every rank the same.
        """
        for level, loss in zip(indices.tolist(), losses.detach().double().cpu()):
            self.losses[level, self.counts[level] % self.losses.shape[1]] = loss
            self.counts[level] += 1

    def update_loss_history(self, sigma: Tensor, loss: Tensor) -> None:
        """Remember unweighted losses [N] at noise levels of the grid [N]."""
        self.update_with_losses(self.index_of(sigma), loss)

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the memory of another run.

        :raises ValueError: if that run had another grid or memory.
        """
        if state["losses"].shape != self.losses.shape:
            saved, own = tuple(state["losses"].shape), tuple(self.losses.shape)
            raise ValueError(f"the saved history has {saved} levels and losses per level, this sampler {own}")
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


SCHEDULE_SAMPLERS = {
    "lognormal": LogNormalSampler,
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentResampler,
    "vp": VPSampler,
    "ve": VESampler,
    "iddpm": IDDPMSampler,
    "ddpm": DDPMSampler,
}


def create_named_schedule_sampler(name: str, diffusion: Any) -> ScheduleSampler:
    """The law `name`.

    :param diffusion: a KarrasDenoiser, whose grid of `num_timesteps` levels the laws on a grid use, or a grid [K].
    :raises ValueError: for a name that is not in SCHEDULE_SAMPLERS.
    """
    kind = lookup(SCHEDULE_SAMPLERS, name, "schedule_sampler")
    if kind not in (UniformSampler, LossSecondMomentResampler):
        return kind()
    is_grid = not hasattr(diffusion, "noise_levels")
    return kind(diffusion if is_grid else diffusion.noise_levels(diffusion.num_timesteps))


def as_grid(sigmas: Any) -> Tensor:
    """Noise levels as float32 [K]; a count of levels, which the grid laws were once given, is no grid."""
    grid = th.as_tensor(sigmas, dtype=th.float32)
    if grid.ndim != 1 or len(grid) == 0 or not (grid > 0).all():
        raise ValueError(
            "a law on a grid needs the noise levels themselves, [K] and positive, as karras_grid(40) gives them; "
            f"got {sigmas!r}"
        )
    return grid
