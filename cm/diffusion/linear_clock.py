"""The same network on the linear clock of flow matching: s = sigma / (1 + sigma), y_s = (1 - s) x0 + s z.

y_s = (1 - s) x_sigma. The velocity of the probability-flow ODE is v = dy/ds = z - x0 on average, (y - D) / s for a
denoiser D, and a flow map's mean velocity u(y, s, r) leads from s down to r: y_r = y_s - (s - r) u.

A flow map is a denoiser with a second argument, the gap s - r: u = (y - D(x, sigma, gap)) / s. Then D(x, sigma, s) is
the image, D(x, sigma, 0) the denoised image, and x at r is the point that Euler's step to there has.

Shapes: N batch. Times and noise levels are [N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cm.diffusion.denoiser import Diffusion
from cm.tensors import append_dims


def time(sigma: Tensor) -> Tensor:
    """s of noise levels."""
    return sigma / (1 + sigma)


def level(s: Tensor) -> Tensor:
    """The noise levels of times below 1."""
    return s / (1 - s)


def mean_velocity(y: Tensor, denoised: Tensor, s: Tensor) -> Tensor:
    """u where D(x, sigma, s - r) is `denoised`: [N,C,H,W]."""
    return (y - denoised) / append_dims(s, y.ndim)


def mean_velocity_of(
    diffusion: Diffusion, model: Callable[..., Tensor], cond: dict[str, Any]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """u as a function of y [N,C,H,W], s and r, without the difference of near numbers over s.

    u = (s - (1 - s) sd^2) / V y - sd / sqrt(V) Net(y / sqrt(V)) with V = (1 - s)^2 sd^2 + s^2.

    :param diffusion: of EDM's scalings, with sigma_data sd.
    """
    sd = diffusion.sigma_data

    def u(y: Tensor, s: Tensor, r: Tensor) -> Tensor:
        wide = append_dims(s, y.ndim)
        V = ((1 - wide) * sd) ** 2 + wide**2
        output = model(y * V.rsqrt(), diffusion.noise_labels(level(s), y.dtype), gap=s - r, **cond)
        return (wide - (1 - wide) * sd**2) / V * y - sd * V.rsqrt() * output

    return u
