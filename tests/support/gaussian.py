"""Data whose optimal denoiser is known in closed form, in float64; stored values in tests/data/gaussian_testbed.npz.

x_t = x_0 + t z with z standard normal. Shapes: N batch, d dimensions, K components of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch as th
from torch import Tensor

DATA = Path(__file__).resolve().parents[1] / "data"
EPS = 0.002                                                         # where a consistency function ends


@cache
def _archive() -> np.lib.npyio.NpzFile:
    return np.load(DATA / "gaussian_testbed.npz", allow_pickle=False)


def stored(name: str) -> Tensor:
    """One stored array, float64 or int64."""
    return th.from_numpy(np.atleast_1d(_archive()[name]))


def column(t: Tensor | float, x: Tensor) -> Tensor:
    """[N] or a number -> a shape that multiplies x [N,...]."""
    t = th.as_tensor(t, dtype=x.dtype)
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (x.ndim - 1))


@dataclass
class Gaussian:
    """x_0 ~ N(mu, s^2 I); mu is a number or broadcasts against x."""

    mu: Tensor | float
    s: float

    def variance(self, t: Tensor | float) -> Tensor | float:
        return self.s**2 + t**2

    def D(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The optimal denoiser E[x_0 | x_t = x]."""
        t = column(sigma, x)
        return (self.s**2 * x + t**2 * self.mu) / self.variance(t)

    def flow(self, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        """Where the probability-flow ODE carries x from t to r."""
        t, r = column(t, x), column(r, x)
        return self.mu + (x - self.mu) * (self.variance(r) / self.variance(t)) ** 0.5

    def f(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The consistency function: the flow to EPS."""
        return self.flow(x, sigma, EPS)

    def flow_map(self, x: Tensor, sigma: Tensor, gap: Tensor) -> Tensor:
        """y - s u, where u leads from y at s = sigma / (1 + sigma) to the point of the flow at s - gap; D at gap 0."""
        s = sigma / (1 + sigma)
        y, r = x * column(1 - s, x), s - gap
        y_r = self.flow(x, sigma, r / (1 - r)) * column(1 - r, x)
        jump = y - column(s, x) * (y - y_r) / column(gap.clamp(min=1e-300), x)
        return jump.where(column(gap, x) > 0, self.D(x, sigma))

    def denoiser_for(self, sampler: str) -> Callable[..., Tensor]:
        """What a sampler by this name evaluates."""
        return self.flow_map if sampler == "flowmap" else self.D

    @classmethod
    def stored(cls) -> Gaussian:
        return cls(stored("g_mu"), stored("g_s").item())


@dataclass
class Mixture:
    """x_0 ~ sum_k w_k N(mu_k, s_k^2 I)."""

    w: Tensor                                                       # [K]
    mu: Tensor                                                      # [K,d]
    s: Tensor                                                       # [K]

    def D(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The optimal denoiser E[x_0 | x_t = x]: [N,d] -> [N,d]."""
        t = column(sigma, x)                                        # [N,1]
        v = self.s**2 + t**2                                        # [N,K]
        gap = x[:, None, :] - self.mu                               # [N,K,d]
        log_weight = self.w.log() - x.shape[1] / 2 * v.log() - gap.square().sum(2) / (2 * v)
        gamma = log_weight.softmax(1)                               # [N,K]
        mean = (self.s**2)[:, None] * x[:, None, :] + (t**2)[..., None] * self.mu
        return (gamma[..., None] * mean / v[..., None]).sum(1)

    @classmethod
    def stored(cls) -> Mixture:
        return cls(stored("m_w"), stored("m_mu"), stored("m_s"))


class Scripted:
    """A noise source that hands out prepared draws, in order; asking for more than there are is an error."""

    def __init__(self, *draws: Tensor):
        self.draws = list(draws)

    def randn(self, *shape: int, dtype: th.dtype | None = None, device: object = None) -> Tensor:
        draw = self.draws.pop(0)
        assert draw.shape == th.Size(shape)
        return draw

    def randn_like(self, x: Tensor) -> Tensor:
        return self.randn(*x.shape)

    def randint(self, low: int, high: int, size: tuple[int, ...], device: object = None) -> Tensor:
        draw = self.randn(*size)
        assert draw.min() >= low and draw.max() < high
        return draw


def level(t: Tensor | float, x: Tensor) -> Tensor:
    """The same noise level for every sample of x: [N]."""
    return th.full((len(x),), float(t), dtype=x.dtype)


def levels_of(x: Tensor, *levels: float) -> list[Tensor]:
    """Noise levels, each as an [N] for x."""
    return [level(t, x) for t in levels]
