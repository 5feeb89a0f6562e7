"""The discrete variance-preserving diffusion of DDPM, expressed in noise levels.

Source: Ho et al. 2020 (DDPM, arXiv 2006.11239), equation 4, with its linear schedule. The noisy image of timestep t is
x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) z, t = 0..T-1; divided by sqrt(abar_t) it is x0 + sigma_t z, an image at
the noise level sigma_t = sqrt((1 - abar_t) / abar_t). So one table translates between timesteps and noise levels.
Everything here is float64.

Shapes: N batch, T timesteps.
"""

from __future__ import annotations

from functools import cache

import torch as th
from torch import Tensor
from torch.types import Device

TIMESTEPS, BETA_FIRST, BETA_LAST = 1000, 1e-4, 0.02
SNAP = 1e-4                                                         # float32 moves a level by at most 1e-5 timesteps


@cache
def alpha_bars(device: Device = "cpu") -> Tensor:
    """abar_t, the share of the image's variance that is left at each timestep: [T], falling. Equation 4."""
    betas = th.linspace(BETA_FIRST, BETA_LAST, TIMESTEPS, dtype=th.float64)
    return (1 - betas).cumprod(0).to(device, non_blocking=True)


@cache
def sigmas(device: Device = "cpu") -> Tensor:
    """The noise level of each timestep: [T], rising from 0.01 to 157."""
    abar = alpha_bars(device)
    return ((1 - abar) / abar).sqrt()


def timestep_of(sigma: Tensor) -> Tensor:
    """The timestep that a network is conditioned on at noise levels [N]: float64 [N] in 0..T-1.

    Between two timesteps it is linear in ln(sigma); outside of them it is the nearest one.
    """
    known = sigmas(sigma.device).log()
    wanted = sigma.double().log().clamp(known[0], known[-1])
    below = th.searchsorted(known, wanted, right=True).clamp(1, TIMESTEPS - 1) - 1
    t = below + (wanted - known[below]) / (known[below + 1] - known[below])
    return th.where((t - t.round()).abs() < SNAP, t.round(), t)     # levels of the table become integers


def earlier(sigma: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The noise levels k timesteps closer to the image, [N], and whether there are such timesteps, bool [N].

    Where there are none, the level is that of timestep 0.

    :param sigma: levels of timesteps [N]; any other level is replaced by that of the nearest timestep.
    """
    t = timestep_of(sigma).round().long()
    return sigmas(sigma.device)[(t - k).clamp(min=0)].to(sigma.dtype), t >= k
