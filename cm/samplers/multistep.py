"""Multistep consistency sampling: Song et al. 2023 (Consistency Models, arXiv 2303.01469), algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cm.diffusion.schedules import append_zero, karras_grid
from cm.errors import UserError
from cm.samplers.base import Sampler
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource, Result

EXAMPLE = "such as --ts 0,22,39 with --steps 40"


@dataclass(frozen=True)
class Multistep(Sampler):
    """Alternate between denoising to the data and adding noise up to the next level; the last image has no noise.

    :param ts: indices into a Karras grid of `steps` levels, from 0 to steps-1. The network is not evaluated at
        the last one: (0, 22, 39) of 40 evaluates it twice.
    :param sigma_min: the level at which the consistency function is the identity.
    """

    ts: Sequence[int] | None = None
    sigma_min: float = 0.002

    accepts_churn: ClassVar[bool] = False
    networks: ClassVar[tuple[Result, ...]] = ("consistency_function",)

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """The levels at which the network is evaluated, then 0: float64 [len(ts)].

        :raises UserError: if `ts` is missing, or is not rising from 0 to steps-1.
        """
        ts = _check_ts(self.ts, steps)
        return append_zero(karras_grid(steps, sigma_min, sigma_max, rho)[ts[:-1]])

    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """Denoise, then add noise up to sigma_next."""
        noise_up = (sigma_next**2 - self.sigma_min**2).clamp(min=0).sqrt()
        return D(x, sigma) + rng.randn_like(x) * append_dims(noise_up, x.ndim)


def _check_ts(ts: Sequence[int] | None, steps: int) -> list[int]:
    """The indices as a list.

    :raises UserError: if there are none, or they do not rise from 0 to steps-1.
    """
    if ts is None:
        raise UserError(f"the multistep sampler needs ts, the noise levels to visit, {EXAMPLE}")
    ts = [int(index) for index in ts]
    if len(ts) < 2 or ts[0] != 0 or ts[-1] != steps - 1 or any(b <= a for a, b in zip(ts, ts[1:])):
        got = ",".join(map(str, ts))
        raise UserError(f"--ts {got} with --steps {steps}: ts must rise from 0 to steps-1 = {steps - 1}, {EXAMPLE}")
    return ts
