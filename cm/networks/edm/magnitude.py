"""Layers that keep the magnitude of what passes through them: Karras et al. 2023 (EDM2, arXiv 2312.02696), section 2.

The magnitude of a tensor is its root mean square. Every layer is scaled so that independent inputs of magnitude 1 give
outputs of magnitude 1. Shapes: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn

from cm.networks.held import Holds
from cm.networks.layers import silu

EPS = 1e-4                                                          # added to a magnitude before dividing by it
SILU_MAGNITUDE = 0.596                                              # of silu(x) for normal x, as published


def normalize(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Scale to magnitude 1 over these axes; the magnitude is computed in float32 at least, the dtype is kept."""
    wide = th.promote_types(x.dtype, th.float32)
    norm = th.linalg.vector_norm(x, dim=tuple(dims), keepdim=True, dtype=wide)
    return x / (norm / math.sqrt(math.prod(x.shape[dim] for dim in dims)) + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU, scaled: equation 81."""
    return silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, scaled: equation 88. The dtype is that of a."""
    return ((1 - t) * a + t * b.to(a.dtype)) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """[N,C,H,W], [N,D,H,W] -> [N,C+D,H,W], with shares 1 - t and t of the magnitude: equation 103."""
    c, d = a.shape[1], b.shape[1]
    scale = math.sqrt((c + d) / ((1 - t) ** 2 + t**2))
    return th.cat([a * (scale * (1 - t) / math.sqrt(c)), b * (scale * t / math.sqrt(d))], dim=1)


class MPFourier(nn.Module):
    """Waves of random frequencies and phases, which are part of the weights: equation 75."""

    freqs: Tensor                                                   # [channels], radians per unit
    phases: Tensor                                                  # [channels], radians

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * th.randn(channels))
        self.register_buffer("phases", 2 * math.pi * th.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        """[N] -> [N,channels], in float32 at least."""
        t = t.to(th.promote_types(t.dtype, th.float32))
        return math.sqrt(2) * (t[:, None] * self.freqs.to(t.dtype) + self.phases.to(t.dtype)).cos()


class MPConv(Holds):
    """A linear layer or a convolution without bias, whose rows of weights have a fixed magnitude: equation 47.

    The pass normalises the weights that it uses. `force` also normalises those that are stored, see `EDM2Network`.

    :param kernel: side of the filter; 0 for a linear layer.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        self.out_channels, self.padding = out_channels, kernel // 2
        weight = th.randn(out_channels, in_channels, *([kernel] * 2 if kernel else []))
        self.weight = nn.Parameter(self.force(weight))              # as the first step of published runs would do

    @staticmethod
    def force(weight: Tensor) -> Tensor:
        """Every output channel at magnitude 1: equation 66."""
        return normalize(weight, range(1, weight.ndim))

    def to_hold(self) -> Tensor:
        """The weights at gain 1."""
        return self.effective()

    def effective(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weights that a pass uses, whose rows have the L2 norm `gain`."""
        if self.held is not None:
            return self.held if isinstance(gain, float) and gain == 1 else self.held * gain
        return self.force(self.weight) * (gain / math.sqrt(self.weight[0].numel()))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """[N,C] -> [N,out_channels], or [N,C,H,W] -> [N,out_channels,H,W]"""
        return self.apply_weight(self.effective(gain), x)

    def apply_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        """The layer with other weights of its shape, in the precision of x."""
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=self.padding)
