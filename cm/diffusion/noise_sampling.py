"""The noise distributions from which training draws its noise levels.

A distribution draws sigma [N] together with a weight [N] for each sample's loss. Where it deliberately differs from the
distribution that the loss is meant for, the weight corrects for that, so the expected loss does not depend on it.

Shapes: N batch, K noise levels of a grid, M recorded losses per level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th
from torch import Tensor
from torch.types import Device

from cm.diffusion import ddpm_schedule
from cm.diffusion.schedules import VE_LEVELS, VP, VPProcess, iddpm_levels
from cm.random_util import DummyGenerator
from cm.registry import lookup
from cm.types import NoiseSource


class Draw(NamedTuple):
    """Noise levels of a batch, the weights of their losses, and their places in the grid."""

    sigma: Tensor                                                   # [N]
    weight: Tensor                                                  # [N]
    index: Tensor | None                                            # [N] int64 into the grid, if there is one


class ScheduleSampler(ABC):
    """A noise distribution."""

    @abstractmethod
    def draw(self, rng: NoiseSource, n: int, device: Device) -> Draw:
        """n noise levels; row i belongs to sample i of the batch."""

    def sample(self, batch_size: int, device: Device) -> tuple[Tensor, Tensor]:
        """Noise levels and weights, [N] each, from torch's global generator; the call of guided-diffusion."""
        sigma, weight, _ = self.draw(DummyGenerator(), batch_size, device)
        return sigma, weight


class LogNormalSampler(ScheduleSampler):
    """ln sigma ~ N(p_mean, p_std^2): Karras et al. 2022 (EDM, arXiv 2206.00364), table 1."""

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2):
        if not p_std > 0:
            raise ValueError(f"p_std is a standard deviation and must be positive, got {p_std}")
        self.p_mean = p_mean
        self.p_std = p_std

    def draw(self, rng: NoiseSource, n: int, device: Device) -> Draw:
        """n levels exp(p_mean + p_std z), of weight 1."""
        sigma = (rng.randn(n, device=device) * self.p_std + self.p_mean).exp()
        return Draw(sigma, th.ones_like(sigma), None)


@dataclass(frozen=True)
class VPSampler(ScheduleSampler):
    """Times of the variance-preserving process, uniform between its ends: Song et al. 2021 (arXiv 2011.13456)."""

    process: VPProcess = VP

    def draw(self, rng: NoiseSource, n: int, device: Device) -> Draw:
        """n levels sigma(t), t uniform between the ends of the process, of weight 1."""
        first, last = self.process.ends
        sigma = self.process.sigma(first + (last - first) * rng.rand(n, device=device))
        return Draw(sigma, th.ones_like(sigma), None)


@dataclass(frozen=True)
class VESampler(ScheduleSampler):
    """ln sigma uniform between two levels: the variance-exploding process of Song et al. 2021 (arXiv 2011.13456)."""

    levels: tuple[float, float] = VE_LEVELS

    def draw(self, rng: NoiseSource, n: int, device: Device) -> Draw:
        """n levels, uniform in the logarithm, of weight 1."""
        lowest, highest = self.levels
        sigma = lowest * (highest / lowest) ** rng.rand(n, device=device)
        return Draw(sigma, th.ones_like(sigma), None)


class UniformSampler(ScheduleSampler):
    """Every noise level of a grid is as likely as every other.

    :param sigmas: the grid [K].
    """

    def __init__(self, sigmas: Tensor | Sequence[float]):
        self.sigmas = _as_grid(sigmas)

    def draw(self, rng: NoiseSource, n: int, device: Device) -> Draw:
        """n levels of the grid, of weight 1."""
        index = rng.randint(0, len(self.sigmas), (n,), device=device)
        sigma = self.sigmas.to(device, non_blocking=True)[index]
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
    """Levels of a grid in proportion to the root mean square of their last M losses; the weights keep it unbiased.

    Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 18. The distribution is uniform until every level has M
    losses.

    :param sigmas: the grid [K].
    :param history_per_term: M.
    :param uniform_prob: share of the draws that stays uniform, so that every level keeps being drawn.
    :raises ValueError: if history_per_term is below 1, or uniform_prob is no probability.
    """

    def __init__(self, sigmas: Tensor | Sequence[float], history_per_term: int = 10, uniform_prob: float = 0.001):
        if history_per_term < 1:
            raise ValueError(f"history_per_term must be at least 1, got {history_per_term}")
        if not 0 <= uniform_prob <= 1:
            raise ValueError(f"uniform_prob is a probability, got {uniform_prob}")
        self.sigmas = _as_grid(sigmas)
        self.uniform_prob = uniform_prob
        self.losses = th.zeros(len(self.sigmas), history_per_term, dtype=th.float64)    # [K,M], a ring per level
        self.counts = th.zeros(len(self.sigmas), dtype=th.int64)                        # [K], losses ever seen

    def probabilities(self) -> Tensor:
        """The probability of each level: [K] float64."""
        levels, memory = self.losses.shape
        uniform = th.full((levels,), 1 / levels, dtype=th.float64)
        rms = self.losses.square().mean(1).sqrt()
        if (self.counts < memory).any() or rms.sum() == 0:
            return uniform
        return (1 - self.uniform_prob) * rms / rms.sum() + self.uniform_prob * uniform

    def draw(self, rng: NoiseSource, n: int, device: Device) -> Draw:
        """n levels of the grid with the probabilities p, of weight 1 / (K p)."""
        p = self.probabilities().to(device, non_blocking=True)
        u = rng.rand(n, device=device).double()
        index = th.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)       # inverts the distribution
        sigma = self.sigmas.to(device, non_blocking=True)[index]
        return Draw(sigma, (1 / (len(p) * p))[index].to(sigma.dtype), index)

    def index_of(self, sigma: Tensor) -> Tensor:
        """The index of the nearest level of the grid: [N] -> [N] int64."""
        return (sigma[:, None] - self.sigmas.to(sigma.device)).abs().argmin(1)

    def update_with_losses(self, indices: Tensor, losses: Tensor) -> None:
        """Record unweighted losses [N] at the levels `indices` [N].

        There is no communication: with several ranks, gather both first and pass the same tensors on every rank.
        """
        for level, loss in zip(indices.tolist(), losses.detach().double().cpu()):
            self.losses[level, self.counts[level] % self.losses.shape[1]] = loss
            self.counts[level] += 1

    def update_loss_history(self, sigma: Tensor, loss: Tensor) -> None:
        """Record unweighted losses [N] at noise levels of the grid [N]."""
        self.update_with_losses(self.index_of(sigma), loss)

    def state_dict(self) -> dict[str, Tensor]:
        """The recorded losses, for a checkpoint."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the recorded losses of a checkpoint.

        :raises ValueError: if that run had a grid of another length or another history_per_term.
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
    """The noise distribution `name`.

    :param diffusion: a `Diffusion`, or a grid of noise levels [K]. Distributions on a grid use the grid, or the Karras
        grid of `num_timesteps` levels of the diffusion.
    :raises UserError: for a name that is not in SCHEDULE_SAMPLERS.
    """
    kind = lookup(SCHEDULE_SAMPLERS, name, "schedule_sampler")
    if kind not in (UniformSampler, LossSecondMomentResampler):
        return kind()
    is_grid = not hasattr(diffusion, "noise_levels")
    return kind(diffusion if is_grid else diffusion.noise_levels(diffusion.num_timesteps))


def _as_grid(sigmas: Any) -> Tensor:
    """Noise levels as float32 [K].

    :raises ValueError: for anything else, such as the number of levels that guided-diffusion takes.
    """
    grid = th.as_tensor(sigmas, dtype=th.float32)
    if grid.ndim != 1 or len(grid) == 0 or not (grid > 0).all():
        raise ValueError(
            "a noise distribution on a grid needs the noise levels themselves, [K] and positive, as karras_grid(40) "
            f"gives them; got {sigmas!r}"
        )
    return grid
