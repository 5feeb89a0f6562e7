"""openai/consistency_models' `cm.losses`: two Gaussian likelihood terms.

Nothing of the toolkit uses them: its networks predict no variance. Shapes are free; all functions work elementwise.
Source: Ho et al. 2020 (DDPM, arXiv 2006.11239), section 3.3; Page 1977 for the approximation of the normal cdf.
"""

from __future__ import annotations

import math

import torch as th
from torch import Tensor

__all__ = ["approx_standard_normal_cdf", "discretized_gaussian_log_likelihood", "normal_kl"]

HALF_BIN = 1 / 255                                          # of 256 levels in [-1, 1]
LEAST = 1e-12                                               # probabilities below it count as this much


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) in nats; arguments broadcast, numbers may be among them.

    :raises TypeError: if none of the four is a tensor.
    """
    if not any(isinstance(argument, Tensor) for argument in (mean1, logvar1, mean2, logvar2)):
        raise TypeError("normal_kl needs a tensor among its arguments, and got four plain numbers")
    ratio = th.as_tensor(logvar1 - logvar2)                 # log of variance 1 over variance 2
    shift = th.as_tensor((mean1 - mean2) ** 2) * th.as_tensor(-logvar2).exp()
    return (ratio.exp() - 1 - ratio + shift) / 2


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The distribution function of N(0, 1), by a hyperbolic tangent: off by less than 2e-4 everywhere."""
    return (1 + th.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability in nats of 8-bit images under a Gaussian whose outer bins reach to infinity.

    :param x: images in [-1, 1], whose 256 levels are multiples of 2/255.
    :param means, log_scales: mean, and log of the standard deviation, of each value; shaped as x.
    :raises ValueError: if the three shapes differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(f"x, means and log_scales must have one shape, and have {list(x.shape)}, {list(means.shape)} "
                         f"and {list(log_scales.shape)}")
    precision, distance = (-log_scales).exp(), x - means
    below_top = approx_standard_normal_cdf((distance + HALF_BIN) * precision)
    below_bottom = approx_standard_normal_cdf((distance - HALF_BIN) * precision)
    p = th.where(x < -0.999, below_top, th.where(x > 0.999, 1 - below_bottom, below_top - below_bottom))
    return p.clamp(min=LEAST).log()
