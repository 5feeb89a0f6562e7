"""The samplers as plain functions of a denoiser, called as openai/consistency_models calls them.

Each runs one solver of this package with `integrate`; the results are those of `sample` bit for bit. Common arguments:

- `denoiser`, `model` or `distiller`: D(x [N,C,H,W], sigma [N]) -> [N,C,H,W]; `karras_sample` clamps its values, these
  functions do not.
- `x`: [N,C,H,W], noise at the first level.
- `sigmas`: [S+1] falling noise levels, the last one 0, as `get_sigmas_karras` makes them.
- `generator`: the source of noise; None for torch's global generator.
- `progress`: show a bar. `callback`: called after each step, see `integrate`; where there is churn, the raised level
  comes as `sigma_hat` too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import Tensor

from cm.diffusion.schedules import karras_grid
from cm.random_util import DummyGenerator
from cm.samplers.ancestral import Ancestral
from cm.samplers.dpm import DPM
from cm.samplers.euler import Euler
from cm.samplers.heun import Heun
from cm.samplers.integrate import Churn, RecordingDenoiser, integrate, progress_bar
from cm.samplers.multistep import Multistep
from cm.samplers.onestep import OneStep
from cm.samplers.progdist import ProgDist
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource, Sampler

Callback = Callable[[dict[str, Any]], None]


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The slope dx/dsigma of the probability-flow ODE where D(x, sigma) is `denoised`.

    :param x, denoised: [N,C,H,W].
    :param sigma: [N], or one number as a tensor.
    """
    return (x - denoised) / append_dims(sigma, x.ndim)


def get_ancestral_step(sigma_from: Any, sigma_to: Any) -> tuple[Any, Any]:
    """(sigma_down, sigma_up): the level that an ancestral step goes down to, and the noise that it adds afterwards.

    sigma_down^2 + sigma_up^2 = sigma_to^2, where sigma_down = sigma_to^2 / sigma_from. Numbers or tensors of one shape.
    """
    ratio = sigma_to / sigma_from
    return sigma_to * ratio, sigma_to * (1 - ratio**2) ** 0.5


@th.no_grad()
def sample_heun(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: NoiseSource | None, progress: bool = False,
    callback: Callback | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """EDM's solver, see `cm.samplers.heun`; for the churn, see `cm.samplers.integrate.Churn`."""
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    return _run(Heun(), denoiser, x, sigmas, generator, progress, _with_sigma_hat(callback, sigmas), churn)


@th.no_grad()
def sample_dpm(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: NoiseSource | None, progress: bool = False,
    callback: Callback | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """A midpoint method, see `cm.samplers.dpm`; for the churn, see `cm.samplers.integrate.Churn`."""
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    return _run(DPM(), denoiser, x, sigmas, generator, progress, _with_sigma_hat(callback, sigmas), churn)


@th.no_grad()
def sample_euler(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: NoiseSource | None, progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method, see `cm.samplers.euler`."""
    return _run(Euler(), denoiser, x, sigmas, generator, progress, callback)


@th.no_grad()
def sample_euler_ancestral(
    model: Denoiser, x: Tensor, sigmas: Tensor, generator: NoiseSource | None, progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling, see `cm.samplers.ancestral`."""
    return _run(Ancestral(), model, x, sigmas, generator, progress, callback)


@th.no_grad()
def sample_midpoint_ancestral(
    model: Callable[[Tensor, Tensor], Tensor], x: Tensor, ts: Sequence[float] | Tensor,
    generator: NoiseSource | None = None, progress: bool = False, callback: Callback | None = None,
) -> Tensor:
    """The midpoint method for dx/dt = model(x, t) with steps of 1 / len(ts) from each of the times `ts`.

    Despite its name, it adds no noise. `callback` gets `x` after the step, the time `tn`, and both slopes.
    """
    h = 1 / len(ts)

    def at(t: float) -> Tensor:
        return x.new_full((len(x),), t)                             # [N]

    for i in progress_bar(range(len(ts)), progress):
        t = float(ts[i])
        slope = model(x, at(t))
        slope_halfway = model(x + h / 2 * slope, at(t + h / 2))
        x = x + h * slope_halfway
        if callback is not None:
            callback({"x": x, "tn": t, "dn": slope, "dn_2": slope_halfway})
    return x


@th.no_grad()
def sample_onestep(
    distiller: Denoiser, x: Tensor, sigmas: Tensor, generator: NoiseSource | None = None, progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """One evaluation at the first noise level; the others do not matter."""
    return _run(OneStep(), distiller, x, [float(sigmas[0]), 0.0], generator, progress, callback)


@th.no_grad()
def sample_progdist(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: NoiseSource | None = None, progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method down to the second to last level: the 0 at the end of `sigmas` is omitted."""
    return _run(ProgDist(), denoiser, x, sigmas[:-1], generator, progress, callback)


@th.no_grad()
def stochastic_iterative_sampler(
    distiller: Denoiser, x: Tensor, sigmas: Any, generator: NoiseSource | None = None, ts: Sequence[int] | None = None,
    progress: bool = False, callback: Callback | None = None, t_min: float = 0.002, t_max: float = 80.0,
    rho: float = 7.0, steps: int = 40,
) -> Tensor:
    """Multistep consistency sampling, see `cm.samplers.multistep`: denoise, add noise up to the next level, and so on.

    :param sigmas: ignored, unless `ts` is missing: the published ternary_search.py passes `ts` in this position.
    :param ts: indices into the Karras grid of `steps` levels from t_max to t_min; they may repeat. If the last is
        not steps-1, the result keeps the noise of that level.
    """
    indices = [int(index) for index in (sigmas if ts is None else ts)]
    sampler, rng = Multistep(sigma_min=t_min), generator or DummyGenerator()
    levels = karras_grid(steps, t_min, t_max, rho)[indices].tolist()
    D = RecordingDenoiser(distiller, clip=False)
    for i in progress_bar(range(len(levels) - 1), progress):
        level, next_level = (x.new_full((len(x),), sigma) for sigma in levels[i : i + 2])       # [N]
        D.first, start = None, x
        is_last = i == len(levels) - 2 and levels[i + 1] <= t_min
        x = sampler.last_step(D, x, level) if is_last else sampler.step(D, x, level, next_level, rng)
        if callback is not None:
            callback({"i": i, "x": start, "sigma": levels[i], "denoised": D.first})
    return x


def _run(
    sampler: Sampler, D: Denoiser, x: Tensor, sigmas: Tensor | Sequence[float], generator: NoiseSource | None,
    progress: bool, callback: Callback | None, churn: Churn | None = None,
) -> Tensor:
    rng = DummyGenerator() if generator is None else generator
    return integrate(sampler, D, x, sigmas, rng, churn=churn, progress=progress, callback=callback)


def _with_sigma_hat(callback: Callback | None, sigmas: Tensor) -> Callback | None:
    """The callback with the original's values for a step with churn: the level of the grid, and the raised level."""
    if callback is None:
        return None
    return lambda state: callback({**state, "sigma": float(sigmas[state["i"]]), "sigma_hat": state["sigma"]})
