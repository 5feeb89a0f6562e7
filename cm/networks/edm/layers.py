"""Layers of the EDM networks: initialisation, resampling with a filter, normalisation, the residual block.

Names and shapes of parameters are those of the published weights. Shapes: N batch, C channels, H and W height and
width, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn

from cm.errors import UserError
from cm.networks.attention import count_heads, qkv_attention
from cm.networks.fused_norm import norm_act
from cm.networks.held import Holds
from cm.networks.layers import GROUPS, Dropout, GroupNorm32, checkpoint
from cm.networks.modulation import Conditioning, modulation
from cm.tensors import append_dims

Layer = TypeVar("Layer", bound="nn.Linear | nn.Conv2d")

CHANNELS_PER_GROUP = 4                                              # at least


@dataclass(frozen=True)
class Init:
    """The initialisation of a layer's weights and biases.

    :param mode: xavier_uniform (variance 2 / (fan_in + fan_out)), kaiming_uniform or kaiming_normal (1 / fan_in).
    :param weight, bias: factors of weights and biases; a bias has the distribution of the weights of its layer.
    """

    mode: str
    weight: float = 1.0
    bias: float = 0.0

    @th.no_grad()
    def __call__(self, layer: Layer) -> Layer:
        """Initialise a linear layer or a convolution in place, and return it."""
        area = math.prod(layer.weight.shape[2:])
        fan_in, fan_out = layer.weight.shape[1] * area, layer.weight.shape[0] * area
        variance = 2 / (fan_in + fan_out) if self.mode == "xavier_uniform" else 1 / fan_in
        for param, factor in ((layer.weight, self.weight), (layer.bias, self.bias)):
            if param is not None and self.mode == "kaiming_normal":
                param.normal_(std=factor * math.sqrt(variance))
            elif param is not None:
                bound = factor * math.sqrt(3 * variance)
                param.uniform_(-bound, bound)
        return layer


def group_norm(channels: int, eps: float) -> GroupNorm32:
    """Group normalisation with at most 32 groups of at least 4 channels.

    :raises UserError: if the groups do not divide the channels.
    """
    groups = min(GROUPS, channels // CHANNELS_PER_GROUP)
    if groups == 0 or channels % groups:
        raise UserError(f"a layer of {channels} channels cannot be normalised: make its width (num_channels times its "
                        f"channel_mult) a multiple of {GROUPS if groups else CHANNELS_PER_GROUP}")
    return GroupNorm32(groups, channels, eps=eps)


# --- resampling ------------------------------------------------------------------------------------------------------


def _make_filter(taps: Sequence[float]) -> Tensor:
    """The separable filter [1,1,k,k] with these weights, scaled to sum 1."""
    row = th.as_tensor(taps, dtype=th.float32)
    return (row[:, None] * row / row.sum() ** 2)[None, None]


def _downsample(x: Tensor, smooth: Tensor, padding: int) -> Tensor:
    """Filter with zero padding, then keep every other pixel of every other row: [N,C,H,W] -> [N,C,H/2,W/2]."""
    channels, k = x.shape[1], smooth.shape[-1]
    return F.conv2d(x, smooth.to(x.dtype).expand(channels, 1, k, k), groups=channels, stride=2, padding=padding)


def _upsample(x: Tensor, smooth: Tensor, padding: int) -> Tensor:
    """Insert zeros between the pixels, then filter with four times the weights: [N,C,H,W] -> [N,C,2H,2W]."""
    channels, k = x.shape[1], smooth.shape[-1]
    smooth = (4 * smooth).to(x.dtype).expand(channels, 1, k, k)
    return F.conv_transpose2d(x, smooth, groups=channels, stride=2, padding=padding)


class Resample(nn.Module):
    """Halve ("down") or double ("up") height and width."""

    resample_filter: Tensor                                         # [1,1,k,k]

    def __init__(self, direction: str, taps: Sequence[float]) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", _make_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C,H/2,W/2] or [N,C,2H,2W]."""
        return resample(x, self.direction, self.resample_filter)


def resample(x: Tensor, direction: str, smooth: Tensor) -> Tensor:
    """`_downsample` for "down", else `_upsample`, with the padding that centres the filter `smooth` [1,1,k,k]."""
    padding = (smooth.shape[-1] - 1) // 2
    return _downsample(x, smooth, padding) if direction == "down" else _upsample(x, smooth, padding)


class Conv(nn.Conv2d):
    """A convolution that keeps the size, after a change of resolution if there is a direction, "up" or "down"."""

    resample_filter: Tensor                                         # [1,1,k,k], with a direction only

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, direction: str = "", taps: Sequence[float] = (1, 1)
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.direction = direction
        if direction:
            self.register_buffer("resample_filter", _make_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,out_channels,H',W']"""
        if self.direction:
            x = resample(x, self.direction, self.resample_filter)
        return super().forward(x)


class ConvDown(nn.Conv2d):
    """A convolution, then half the resolution: NCSN++ feeds the image to its lower levels through these layers."""

    resample_filter: Tensor                                         # [1,1,k,k]

    def __init__(self, in_channels: int, out_channels: int, kernel: int, taps: Sequence[float]) -> None:
        # The convolution provides the border of the filter, too; beyond the image it reads zeros.
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", _make_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,out_channels,H/2,W/2]"""
        return _downsample(super().forward(x), self.resample_filter, 0)


# --- the residual block ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockOptions:
    """The common options of the blocks of one network.

    :param adaptive_scale: the embedding scales and shifts the second norm's output; otherwise it is added before that.
    :param skip_scale: factor of every sum of two paths.
    :param resample_proj: a change of resolution has a 1x1 convolution on the skip path even at equal width.
    :param taps: weights of the resampling filter.
    :param num_heads, num_head_channels: of attention, as in UNetConfig.
    :param init, init_zero, init_attention: of most layers, of the last on each path, of q, k and v.
    """

    emb_channels: int
    dropout: float
    adaptive_scale: bool
    skip_scale: float
    resample_proj: bool
    taps: Sequence[float]
    eps: float
    num_heads: int
    num_head_channels: int
    init: Init
    init_zero: Init
    init_attention: Init
    use_checkpoint: bool


class UNetBlock(Holds):
    """Norm, SiLU, conv, embedding, norm, SiLU, dropout, conv, with a skip path; then attention if asked for.

    :param direction: "up", "down" or "": what the first convolution and the skip path do to the resolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, options: BlockOptions, direction: str = "", attention: bool = False
    ) -> None:
        super().__init__()
        o = self.options = options
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm0 = group_norm(in_channels, o.eps)
        self.conv0 = o.init(Conv(in_channels, out_channels, 3, direction, o.taps))
        self.affine = o.init(nn.Linear(o.emb_channels, 2 * out_channels if o.adaptive_scale else out_channels))
        self.norm1 = group_norm(out_channels, o.eps)
        self.dropout = Dropout(o.dropout)
        self.conv1 = o.init_zero(Conv(out_channels, out_channels, 3))
        self.skip: nn.Module | None = None
        if in_channels != out_channels or (direction and o.resample_proj):
            self.skip = o.init(Conv(in_channels, out_channels, 1, direction, o.taps))
        elif direction:
            self.skip = Resample(direction, o.taps)
        self.num_heads = count_heads(out_channels, o.num_heads, o.num_head_channels) if attention else 0
        if attention:
            self.norm2 = group_norm(out_channels, o.eps)
            self.qkv = o.init_attention(Conv(out_channels, 3 * out_channels, 1))
            self.proj = o.init_zero(Conv(out_channels, out_channels, 1))

    @property
    def projection(self) -> nn.Module:
        """From the embedding to a number for each channel, or two."""
        return self.affine

    @property
    def has_gain(self) -> bool:
        """Whether the embedding scales the channels, too."""
        return self.options.adaptive_scale

    @property
    def modulated_norm(self) -> nn.GroupNorm:
        """The norm whose result the embedding scales and shifts."""
        return self.norm1

    def to_hold(self) -> tuple[Tensor, Tensor] | None:
        """The rows of the layer before attention in the order of a pass."""
        return self._sorted_qkv() if self.num_heads else None

    def forward(self, x: Tensor, emb: Conditioning) -> Tensor:
        """[N,C,H,W], [N,E] -> [N,out_channels,H',W']"""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.options.use_checkpoint)

    def _forward(self, x: Tensor, emb: Conditioning) -> Tensor:
        h = self.conv0(norm_act(self.norm0, x))
        gain, shift, whole = modulation(self, emb, h.dtype)
        if gain is None:
            h = norm_act(self.norm1, h + append_dims(shift.to(h.dtype), h.ndim))
        else:
            h = norm_act(self.norm1, h, gain, shift, whole=whole)
        h = self.conv1(self.dropout(h))
        x = (h + (x if self.skip is None else self.skip(x))) * self.options.skip_scale
        if self.num_heads:
            x = (x + self._attend(x)) * self.options.skip_scale
        return x

    def _sorted_qkv(self) -> tuple[Tensor, Tensor]:
        # The rows of published weights are q, k and v of each channel in turn. Sorting the rows costs less than
        # sorting their outputs.
        assert self.qkv.bias is not None
        weight, bias = (rows.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
                        for rows in (self.qkv.weight, self.qkv.bias))
        return weight, bias

    def _attend(self, x: Tensor) -> Tensor:
        weight, bias = self._sorted_qkv() if self.held is None else self.held
        qkv = F.conv2d(norm_act(self.norm2, x, silu=False), weight, bias)
        return self.proj(qkv_attention(qkv, self.num_heads))
