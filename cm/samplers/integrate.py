"""The loop of all samplers: churn, clipping, progress and callbacks. A sampler only computes a step.

Shapes: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.networks.jvp import evaluations_of_a_call, inside_jvp, jvp
from cm.tensors import clip_to_pixels
from cm.types import Denoiser, NoiseSource, Sampler


@dataclass(frozen=True)
class Churn:
    """Noise that is added before a step (churn): Karras et al. 2022 (EDM, arXiv 2206.00364), algorithm 2.

    :param s_churn: total amount over the grid; each step raises sigma by at most a factor of sqrt(2).
    :param s_tmin, s_tmax: the noise levels, inclusive, at which noise is added.
    :param s_noise: factor of the standard deviation of that noise.
    :raises ValueError: if s_churn or s_noise is negative.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if self.s_churn < 0 or self.s_noise < 0:
            raise ValueError(f"s_churn and s_noise must not be negative, got {self.s_churn} and {self.s_noise}")

    def gamma(self, sigma: float, steps: int) -> float:
        """The relative increase of sigma before a step that starts there, for a grid of `steps` steps."""
        return min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0


class CountingDenoiser:
    """A denoiser that counts its evaluations: the NFE of a sampler is measured, not assumed.

    A forward-mode pass counts as JVP_COST evaluations, and a nested pass as JVP_COST^2. A denoiser that
    evaluates a second network, as guidance does, counts those evaluations itself, as `extra_calls`.
    """

    def __init__(self, D: Denoiser):
        self.D = D
        self.own_calls = 0

    @property
    def calls(self) -> int:
        """Evaluations so far."""
        return self.own_calls + getattr(self.D, "extra_calls", 0)

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        self.own_calls += evaluations_of_a_call()
        return self.D(x, sigma, **cond)


class RecordingDenoiser:
    """The denoiser that a solver calls: it clips if asked, and records its first output of each step."""

    def __init__(self, D: Denoiser, clip: bool):
        self.D = D
        self.clip = clip
        self.first: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        denoised = self.D(x, sigma, **cond)
        if self.clip:
            denoised = clip_to_pixels(denoised)
        if not inside_jvp():                                        # there it carries a tangent, too
            self.record(denoised)
        return denoised

    def record(self, denoised: Tensor) -> None:
        """Keep the denoised image [N,C,H,W] if it is the first one since `first` was last reset to None."""
        if self.first is None:
            self.first = denoised


def denoise_jvp(
    D: Denoiser, x: Tensor, sigma: Tensor, dx: Tensor, dsigma: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """D(x, sigma) and its first-order change along (dx [N,C,H,W], dsigma [N]), in one forward-mode pass."""
    if dsigma is None:
        denoised, change = jvp(lambda z: D(z, sigma), (x,), (dx,))
    else:
        denoised, change = jvp(lambda z, level: D(z, level), (x, sigma), (dx, dsigma))
    if isinstance(D, RecordingDenoiser):
        D.record(denoised)
    return denoised, change


def integrate(
    sampler: Sampler,
    D: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    rng: NoiseSource,
    *,
    churn: Churn | None = None,
    clip_denoised: bool = False,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """Carry x from the first noise level of a grid to the last.

    :param x: [N,C,H,W] at noise level sigmas[0].
    :param sigmas: S+1 falling levels for S steps; a last level of 0 is reached by the sampler's `last_step`.
    :param rng: noise is drawn from it only where a step uses noise.
    :param churn: only for samplers with `accepts_churn`.
    :param clip_denoised: clamp every value of D to [-1, 1].
    :param callback: called after each step with its number `i`, where it began (`x`, `sigma`; after churn) and the
        first denoised image of the step (`denoised`).
    :raises ValueError: for a grid that does not fall.
    :raises UserError: for churn in a sampler that does not use it.
    """
    levels = [float(sigma) for sigma in sigmas]                     # on the host: the loop branches on them
    steps = len(levels) - 1
    if steps < 1 or levels[-1] < 0 or not all(b < a for a, b in zip(levels, levels[1:])):
        raise ValueError(f"a sampler needs at least two noise levels, falling, none negative; got {levels}")
    if churn is not None and churn.s_churn > 0 and not sampler.accepts_churn:
        raise UserError(f"the sampler {type(sampler).__name__} takes no churn: set s_churn to 0, or use heun or dpm")

    def level(sigma: float) -> Tensor:
        return x.new_full((len(x),), sigma)                         # [N]

    recording = RecordingDenoiser(D, clip_denoised)
    for i in progress_bar(range(steps), progress):
        sigma, sigma_next = levels[i], levels[i + 1]
        gamma = churn.gamma(sigma, steps) if churn is not None else 0.0
        if churn is not None and gamma > 0:
            sigma_hat = sigma * (1 + gamma)
            x = x + rng.randn_like(x) * (churn.s_noise * math.sqrt(sigma_hat**2 - sigma**2))
            sigma = sigma_hat
        recording.first, start = None, x
        if sigma_next > 0:
            solver = solver_at(sampler, th.tensor(sigma, dtype=x.dtype))
            x = solver.step(recording, x, level(sigma), level(sigma_next), rng)
        else:
            x = sampler.last_step(recording, x, level(sigma))
        if callback is not None:
            callback({"i": i, "x": start, "sigma": sigma, "denoised": recording.first})
    return x


def solver_at(sampler: Sampler, sigma: Tensor) -> Sampler:
    """The solver for a step from a level, see `cm.samplers.base.Sampler.at`; samplers without `at` stay as they are."""
    at = getattr(sampler, "at", None)
    return sampler if at is None else at(sigma)


def progress_bar(steps: range, show: bool) -> Any:
    """The range itself, or with `show` an iterator over it that displays a bar."""
    if not show:
        return steps
    from cm.io.progress import progress

    return progress(steps, "sampling", leave=False)
