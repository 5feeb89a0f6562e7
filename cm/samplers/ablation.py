"""A sampler whose options are the choices of older samplers: Karras et al. 2022 (EDM, arXiv 2206.00364), table 1 and
algorithm 1.

In a process whose data are scaled by s(t) and noised to the level sigma(t), x = s(t) (x0 + sigma(t) z), the
probability-flow ODE is

    dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x / s, sigma).

Between steps, the solver keeps x / s, an image at noise level sigma, as everywhere in this toolkit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch as th
from torch import Tensor

from cm.diffusion.schedules import (
    SIGMA_MAX,
    SIGMA_MIN,
    VE_LEVELS,
    VP,
    VPProcess,
    append_zero,
    iddpm_levels,
    karras_grid,
)
from cm.errors import UserError
from cm.registry import lookup
from cm.samplers.base import Sampler
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource

EARLIEST = 1e-3                                                     # time of the VP process at which sampling ends
SOLVERS = ("euler", "heun")


# --- sigma(t), and its slope and inverse, in float64: [N] -> [N] -----------------------------------------------------


class Schedule(ABC):
    """The noise level as a function of time."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The noise level at the time t."""

    @abstractmethod
    def slope(self, t: Tensor) -> Tensor:
        """Its derivative, sigma'(t)."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""


class Linear(Schedule):
    """sigma = t: EDM's own."""

    def sigma(self, t: Tensor) -> Tensor:
        """t"""
        return t

    def slope(self, t: Tensor) -> Tensor:
        """1"""
        return th.ones_like(t)

    def time(self, sigma: Tensor) -> Tensor:
        """sigma"""
        return sigma


class SquareRoot(Schedule):
    """sigma = sqrt(t): the variance-exploding process."""

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(t)"""
        return t.sqrt()

    def slope(self, t: Tensor) -> Tensor:
        """1 / (2 sqrt(t))"""
        return 0.5 / t.sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """sigma^2"""
        return sigma**2


class VariancePreserving(Schedule):
    """sigma(t) of the VP process that has sigma_max at t = 1 and sigma_min at t = EARLIEST."""

    def __init__(self, sigma_min: float, sigma_max: float):
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / EARLIEST - high) / (EARLIEST - 1)
        self.process = VPProcess(beta_d, high - beta_d / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)"""
        return self.process.sigma(t)

    def slope(self, t: Tensor) -> Tensor:
        """(beta_min + beta_d t) (sigma + 1 / sigma) / 2"""
        sigma = self.sigma(t)
        return (self.process.beta_min + self.process.beta_d * t) / 2 * (sigma + 1 / sigma)

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        return self.process.time(sigma)


SCHEDULES: dict[str, Callable[[float, float], Schedule]] = {        # from sigma_min and sigma_max
    "vp": VariancePreserving,
    "ve": lambda sigma_min, sigma_max: SquareRoot(),
    "linear": lambda sigma_min, sigma_max: Linear(),
}


# --- s(t), as a function of the noise level --------------------------------------------------------------------------


def _unscaled(sigma: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(s, s'/s) of s = 1: the data are not scaled."""
    return th.ones_like(sigma), th.zeros_like(sigma)


def _variance_kept(sigma: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(s, s'/s) of s = 1 / sqrt(1 + sigma^2): noisy data of variance 1 keep this variance."""
    return (1 + sigma**2).rsqrt(), -sigma * slope / (1 + sigma**2)


SCALINGS = {"vp": _variance_kept, "none": _unscaled}


# --- the noise levels of the steps -----------------------------------------------------------------------------------


class Discretization(NamedTuple):
    """The levels of the steps: (shares [S] from 0 to 1, sigma_min, sigma_max, rho) -> falling levels [S], float64."""

    levels: Callable[[Tensor, float, float, float], Tensor]
    sigma_min: float                                                # the defaults of the process
    sigma_max: float


def _even_in_time(share: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """The VP process at evenly spaced times, from 1 to EARLIEST."""
    return VariancePreserving(sigma_min, sigma_max).sigma(1 + share * (EARLIEST - 1))


def _in_constant_ratio(share: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """A geometric sequence from sigma_max to sigma_min: the VE process."""
    return sigma_max * (sigma_min / sigma_max) ** share


def _of_iddpm(share: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Evenly spaced entries of iDDPM's table between sigma_min and sigma_max.

    :raises UserError: if the table has fewer entries there than there are steps.
    """
    table = iddpm_levels()
    known = table[(table >= sigma_min) & (table <= sigma_max)]
    if len(known) < len(share):
        raise UserError(f"iDDPM has only {len(known)} noise levels from {sigma_min:g} to {sigma_max:g}, fewer than "
                        f"{len(share)} steps: lower --steps")
    return known[((len(known) - 1) * share).round().long()]


def _of_edm(share: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """A Karras grid."""
    return karras_grid(len(share), sigma_min, sigma_max, rho)


DISCRETIZATIONS = {
    "vp": Discretization(_even_in_time, VP.sigma(EARLIEST), VP.sigma(1.0)),
    "ve": Discretization(_in_constant_ratio, *VE_LEVELS),
    "iddpm": Discretization(_of_iddpm, 0.002, 81.0),
    "edm": Discretization(_of_edm, SIGMA_MIN, SIGMA_MAX),
}


@dataclass(frozen=True)
class Ablation(Sampler):
    """EDM's general sampler; with the default options, EDM's Heun sampler.

    :param solver: euler, or heun, whose first stage covers the fraction alpha of the step.
    :param disc: how the noise levels of the steps are chosen.
    :param schedule: sigma(t).
    :param scaling: s(t).
    :param alpha: for heun: 1 is Heun's method, 1/2 the midpoint method, 2/3 Ralston's.
    :param sigma_min, sigma_max: ends of the grid, which determine the vp schedule.
    :raises UserError: for an unknown name, or alpha outside (0, 1].
    """

    solver: str = "heun"
    disc: str = "edm"
    schedule: str = "linear"
    scaling: str = "none"
    alpha: float = 1.0
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX

    order: ClassVar[float] = 2                                      # of the heun solver

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(SOLVERS), self.solver, "solver")
        for table, name, what in ((DISCRETIZATIONS, self.disc, "disc"), (SCHEDULES, self.schedule, "schedule"),
                                  (SCALINGS, self.scaling, "scaling")):
            lookup(table, name, what)
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha={self.alpha:g} is not a share of a step, above 0 and at most 1")

    @property
    def noise_schedule(self) -> Schedule:
        """sigma(t), which `schedule` names."""
        return SCHEDULES[self.schedule](self.sigma_min, self.sigma_max)

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """The levels that `disc` chooses, then 0: float64 [steps+1]."""
        share = th.arange(steps, dtype=th.float64) / max(steps - 1, 1)
        return append_zero(DISCRETIZATIONS[self.disc].levels(share, sigma_min, sigma_max, rho))

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource | None) -> Tensor:
        """One step of `solver`; uses no random numbers."""
        return self._move(D, x, sigma, sigma_next, self.solver)

    def last_step(self, D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        """An Euler step to t = 0, where sigma is 0 and s is 1."""
        return self._move(D, x, sigma, th.zeros_like(sigma), "euler")

    def _move(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, solver: str) -> Tensor:
        """A step of the ODE at the top of the module; `scaled` is the paper's x, and x is scaled / s."""
        schedule, factors = self.noise_schedule, SCALINGS[self.scaling]

        def wide(value: Tensor) -> Tensor:
            return append_dims(value.to(x.dtype), x.ndim)

        def direction(scaled: Tensor, t: Tensor, level: Tensor) -> Tensor:
            slope = schedule.slope(t)
            s, s_ratio = factors(level, slope)
            denoised = D(scaled / wide(s), level.to(x.dtype))
            return wide(slope / level + s_ratio) * scaled - wide(slope * s / level) * denoised

        def size(level: Tensor) -> Tensor:
            return wide(factors(level, th.ones_like(level))[0])

        sigma, sigma_next = sigma.double(), sigma_next.double()
        # The vp process of a low sigma_min (beta_min < 0) has the level 0 at a later time, too; sampling ends at t = 0.
        t, t_next = schedule.time(sigma), schedule.time(sigma_next) * (sigma_next > 0)
        h = t_next - t
        scaled = x * size(sigma)
        d = direction(scaled, t, sigma)
        if solver == "euler":
            return (scaled + wide(h) * d) / size(sigma_next)
        t_mid = t + self.alpha * h
        sigma_mid = sigma_next if self.alpha == 1 else schedule.sigma(t_mid)
        d_mid = direction(scaled + wide(self.alpha * h) * d, t_mid, sigma_mid)
        weight = 1 / (2 * self.alpha)
        return (scaled + wide(h) * ((1 - weight) * d + weight * d_mid)) / size(sigma_next)
