"""The same network on TrigFlow's clock: Lu and Song 2024 (sCM, arXiv 2410.11081), section 3.

With t = arctan(sigma / sigma_data) and x_t = cos(t) x_sigma, an EDM network needs no change: its input c_in x_sigma is
x_t / sigma_data, TrigFlow's F is the negative of its output, and TrigFlow's consistency function f is D:

    D(x_sigma, sigma) = cos(t) x_t - sigma_data sin(t) F(x_t / sigma_data, t)

Shapes: N batch. Angles and noise levels are [N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from torch import Tensor

from cm.diffusion.denoiser import Diffusion


def angle(sigma: Tensor, sigma_data: float) -> Tensor:
    """t of noise levels."""
    return th.atan(sigma / sigma_data)


def network_of(
    diffusion: Diffusion, model: Callable[..., Tensor], cond: dict[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """F as a function of x_t / sigma_data [N,C,H,W] and ln sigma [N].

    ln sigma and not t, for d ln sigma = dt / (sin t cos t): the derivative that sCM asks for, sin t cos t d/dt, is that
    by ln sigma, without the cancellation of two large factors.

    :param diffusion: of EDM's scalings.
    """
    def F(x: Tensor, log_sigma: Tensor) -> Tensor:
        return -model(x, diffusion.noise_labels(log_sigma.exp(), x.dtype), **cond)

    return F
