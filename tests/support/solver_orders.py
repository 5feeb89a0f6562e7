"""How far a sampler is from what it approximates: path by path (strong), and in the law of its results (weak).

Strong errors follow Brownian paths that all samplers share. Weak errors are integrals, not averages over draws: they
have no statistical error. u = sigma^2. Shapes: P paths, d dimensions, M places, F test functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch as th
from torch import Tensor

from cm.diffusion.schedules import karras_grid
from cm.samplers import Churn, integrate
from cm.samplers.ancestral import Ancestral
from cm.samplers.ddim import DDIM
from cm.samplers.euler_maruyama import EulerMaruyama
from cm.samplers.ito_taylor import Coefficients, ItoTaylor
from support.gaussian import Mixture, Scripted

# The samplers of the reverse SDE, and the orders that theory gives: strong on Gaussian data and on the mixture, weak. A
# linear score lifts the first to 2.
SAMPLERS = {
    "sde": EulerMaruyama(),
    "ancestral, or ddim with eta 1": Ancestral(),
    "ito": ItoTaylor(),
    "ito, taylor form": ItoTaylor(ito_form="taylor"),
    "ito, taylor form without Laplacian": ItoTaylor(ito_form="taylor", ito_laplacian="none"),
}
EXPECTED = {
    "sde": (1.0, 1.0, 1.0),
    "ancestral, or ddim with eta 1": (1.0, 1.0, 1.0),
    "ito": (2.0, 1.5, 2.0),
    "ito, taylor form": (2.0, 1.5, 2.0),
    "ito, taylor form without Laplacian": (2.0, 1.0, 1.0),
}

# --- strong ----------------------------------------------------------------------------------------------------------


@dataclass
class Paths:
    """Brownian paths while sigma falls from `high` to `low`, known on a fine Karras grid.

    W = int dW and over_u = int dW / u of a fine step are drawn from their joint law, so that sums over them are exact.
    """

    bed: Any                                                        # has the denoiser D
    fine: int
    count: int
    high: float = 2.0
    low: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        rng = th.Generator().manual_seed(self.seed)
        self.grid = karras_grid(self.fine + 1, self.low, self.high)
        u, u_next = self.grid[:-1] ** 2, self.grid[1:] ** 2
        var_W, var_over_u, cov = u - u_next, 1 / u_next - 1 / u, (u / u_next).log()
        xi = th.randn(2, self.fine, self.count, 2, generator=rng, dtype=th.float64)
        rest = (var_W - cov**2 / var_over_u).sqrt()
        self.over_u = wide(var_over_u.sqrt()) * xi[0]
        self.W = wide(cov / var_over_u.sqrt()) * xi[0] + wide(rest) * xi[1]
        # In sigma-time, t to r, dW is sqrt(2 s) dV. V = int dV and Z = int (s - r) dV are nearly functions of these:
        # what their regression leaves out is smaller by the square of the relative step.
        t, r, root = self.grid[:-1], self.grid[1:], math.sqrt(2)

        def regression(with_W: Tensor, with_over_u: Tensor) -> Tensor:
            on_over_u = with_over_u / var_over_u.sqrt()
            return wide(on_over_u) * xi[0] + wide((with_W - cov / var_over_u * with_over_u) / rest) * xi[1]

        self.V = regression(root * 2 / 3 * (t**1.5 - r**1.5), root * 2 * (r**-0.5 - t**-0.5))
        self.Z = regression(
            root * (2 / 5 * (t**2.5 - r**2.5) - 2 / 3 * r * (t**1.5 - r**1.5)),
            root * 2 * ((t**0.5 + r * t**-0.5) - 2 * r**0.5),
        )
        self.x = self.high * th.randn(self.count, 2, generator=rng, dtype=th.float64)
        self.probes = th.randn(self.fine, self.count, 2, generator=rng, dtype=th.float64)

    def draws(self, sampler: Any, steps: int) -> list[Tensor]:
        """The normal numbers that this sampler would have drawn on these paths, in order."""
        stride = self.fine // steps
        levels = self.grid[::stride]
        t, r = levels[:-1], levels[1:]
        W, over_u = (piece.reshape(steps, stride, self.count, 2).sum(1) for piece in (self.W, self.over_u))
        if isinstance(sampler, ItoTaylor) and sampler.ito_form == "exp":
            c = Coefficients.of(t, r, th.ones_like(t))
            A = wide(r**2) * over_u
            z1 = A / wide(c.A_z1)
            z2 = (W - A - wide(c.K_z1) * z1) / wide(c.K_z2)
            return [z for pair in zip(z1, z2) for z in pair]
        if isinstance(sampler, Ancestral):
            return list(over_u / wide((1 / r**2 - 1 / t**2).sqrt()))
        z1 = self.V.reshape(steps, stride, self.count, 2).sum(1) / wide((t - r).sqrt())
        if isinstance(sampler, EulerMaruyama):
            return list(z1)
        after = self.grid[1:] - r.repeat_interleave(stride)         # from the end of the fine step to that of the step
        Z = (self.Z + wide(after) * self.V).reshape(steps, stride, self.count, 2).sum(1) / wide((t - r) ** 1.5)
        z2 = (Z - z1 / 2) * math.sqrt(12)
        probes = self.probes[::stride] if sampler.ito_laplacian == "hutchinson" else [None] * steps
        return [z for step in zip(z1, z2, probes) for z in step if z is not None]

    def run(self, sampler: Any, steps: int) -> Tensor:
        return integrate(sampler, self.bed.D, self.x, self.grid[:: self.fine // steps],
                         Scripted(*self.draws(sampler, steps)))

    @cached_property
    def exact(self) -> Tensor:
        """The solution, as nearly as the fine grid gives it: by the best sampler there."""
        return self.run(ItoTaylor(), self.fine)

    def errors(self, sampler: Any, steps: Sequence[int]) -> list[float]:
        """Root mean square distances from the solution."""
        return [(self.run(sampler, n) - self.exact).square().mean().sqrt().item() for n in steps]


def wide(factor: Tensor) -> Tensor:
    """[steps] -> a shape that multiplies [steps,P,d]."""
    return factor[:, None, None]


def order(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The slope of ln(error) over -ln(steps), by least squares."""
    return -float(np.polyfit(np.log(steps), np.log(np.asarray(errors)), 1)[0])


# --- weak ------------------------------------------------------------------------------------------------------------

RATES = (1.0, 2.0, 3.0)                                             # the test functions are cos(k x) and sin(k x)
LINEAR = (ItoTaylor, EulerMaruyama, Ancestral, DDIM)                # the noise enters their steps linearly
QUADRATURE = 24                                                     # nodes for one normal number
REACH, PLACES = 8.0, 1201                                           # places x / sqrt(1 + u) of a value function


def line_bed() -> Mixture:
    """The overlapping mixture in one dimension."""
    stored = Mixture.stored()
    return Mixture(stored.w, stored.mu[:, :1], stored.s)


def weak_errors(
    sampler: Any, steps: int, bed: Mixture, D: Any = None, high: float = 80.0, low: float = 0.002, rho: float = 7.0,
    churn: Mapping[str, float] | None = None, to_data: bool = True,
) -> Tensor:
    """How far the means of the test functions are off, [F], if the sampler starts from the exact law at `high`.

    The mean of f(x_end) given x is carried backwards, step by step, as values at places on the line.

    :param D: another denoiser than the exact one.
    :param churn: of the whole run, see `Churn`.
    :param to_data: take the sampler's own levels, which end at 0 after `low`; else a Karras grid that ends at `low`.
    """
    levels = (sampler.grid(steps, low, high, rho) if to_data else karras_grid(steps + 1, low, high, rho)).tolist()
    high = levels[0]                                                # ddim's are those of timesteps
    places = th.linspace(-REACH, REACH, PLACES, dtype=th.float64)
    D = D or bed.D
    churn = Churn(**{**(churn or {}), "s_churn": (churn or {}).get("s_churn", 0.0) / steps})
    values = tests_at(spread(levels[-1]) * places)                  # [F,M]
    for sigma, sigma_next in reversed(list(zip(levels, levels[1:]))):
        x = (spread(sigma) * places)[:, None]
        arrivals, weights = transition(sampler, D, x, sigma, sigma_next, churn)
        values = interpolate(values, arrivals / spread(sigma_next)) @ weights
    density = mixture_density(bed, spread(high) * places, high)
    means = (values * density).sum(1) * spread(high) * (places[1] - places[0])
    return means - exact_means(bed, 0.0 if to_data else low)


def transition(
    sampler: Any, D: Any, x: Tensor, sigma: float, sigma_next: float, churn: Churn
) -> tuple[Tensor, Tensor]:
    """Where a step leads from places [M,1], for nodes of its noise [M,Q], and their weights [Q]."""
    def step(*draws: float) -> Tensor:
        script = Scripted(*(x.new_full(x.shape, draw) for draw in draws), x.new_ones(x.shape))
        end = integrate(sampler, D, x, [sigma, sigma_next], script, churn=churn)
        return end[:, 0]

    count = draws_of(sampler, sigma, sigma_next, churn)
    if count == 0:
        return step()[:, None], x.new_ones(1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE)
    nodes, weights = th.from_numpy(nodes), th.from_numpy(weights / weights.sum())
    if isinstance(sampler, LINEAR):                                 # all of it together is one normal number
        zero = [0.0] * count
        middle = step(*zero)
        parts = [step(*zero[:i], 1.0, *zero[i + 1 :]) - middle for i in range(count)]
        deviation = sum(part**2 for part in parts).sqrt()
        return middle[:, None] + deviation[:, None] * nodes, weights
    return th.stack([step(node) for node in nodes.tolist()], 1), weights


def draws_of(sampler: Any, sigma: float, sigma_next: float, churn: Churn) -> int:
    """How many normal numbers the step draws; the probe of a Laplacian is none: in one dimension its square is 1."""
    if churn.gamma(sigma, 1) > 0:
        return 1
    if sigma_next == 0 or not isinstance(sampler, LINEAR):
        return 0
    return 2 if isinstance(sampler, ItoTaylor) else 1


def drawn_errors(
    sampler: Any, steps: int, bed: Mixture, D: Any, high: float = 80.0, low: float = 0.002, shape: tuple = (256, 256)
) -> Tensor:
    """The same errors, [F], from draws: an image [N,d] is d independent draws of the bed.

    For samplers whose step depends on the length of an image. The errors of draws are at most 0.7 / sqrt(N d).
    """
    rng = th.Generator().manual_seed(0)
    levels = sampler.grid(steps, low, high, 7.0).tolist()
    k = th.multinomial(bed.w, math.prod(shape), replacement=True, generator=rng)
    spreads = (bed.s[k] ** 2 + levels[0] ** 2).sqrt()
    x = bed.mu[k, 0] + spreads * th.randn(len(k), generator=rng, dtype=th.float64)

    def of_images(x: Tensor, sigma: Tensor) -> Tensor:
        return D(x.reshape(-1, 1), sigma.repeat_interleave(shape[1])).view_as(x)

    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        end = integrate(sampler, of_images, x.view(shape), levels, th)
    return tests_at(end.flatten()).mean(1) - exact_means(bed, 0.0)


def spread(sigma: float) -> float:
    return math.sqrt(1 + sigma**2)


def tests_at(x: Tensor) -> Tensor:
    return th.stack([wave(rate * x) for rate in RATES for wave in (th.cos, th.sin)])


def exact_means(bed: Mixture, sigma: float) -> Tensor:
    """Of a normal law: E cos(k x) = exp(-k^2 v / 2) cos(k mu), and so for the sine."""
    v, mu = bed.s**2 + sigma**2, bed.mu[:, 0]
    return th.stack([
        (bed.w * (-(rate**2) * v / 2).exp() * wave(rate * mu)).sum() for rate in RATES for wave in (th.cos, th.sin)
    ])


def mixture_density(bed: Mixture, x: Tensor, sigma: float) -> Tensor:
    v = bed.s**2 + sigma**2
    return (bed.w * (-((x[:, None] - bed.mu[:, 0]) ** 2) / (2 * v)).exp() / (2 * math.pi * v).sqrt()).sum(1)


def interpolate(values: Tensor, places: Tensor) -> Tensor:
    """Values [F,M] at the places of the grid, read at places [M,Q] by Lagrange's polynomial of degree 5: [F,M,Q]."""
    gap = 2 * REACH / (PLACES - 1)
    position = ((places + REACH) / gap).clamp(0, PLACES - 1)
    first = (position.floor().long() - 2).clamp(0, PLACES - 6)
    s = position - first                                            # in 0..5, mostly 2..3
    result = values.new_zeros(len(values), *places.shape)
    for i in range(6):
        basis = th.ones_like(s)
        for j in range(6):
            if j != i:
                basis = basis * (s - j) / (i - j)
        result += basis * values[:, first + i]
    return result
