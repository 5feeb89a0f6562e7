"""The layers of the U-Net that take the embedding of the time: residual blocks and changes of resolution.

Parameter names are guided-diffusion's: they are the keys of published checkpoints.

Shapes: N batch, C channels, H and W height and width, D embedding width.
"""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from cm.networks.fused_conv import conv_plus
from cm.networks.fused_norm import norm_act
from cm.networks.layers import (
    Dropout,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    zero_module,
)
from cm.networks.modulation import Conditioning, modulation
from cm.tensors import append_dims


class TimestepBlock(nn.Module):
    """A module whose forward takes the embedding of the time (and class) as its second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Conditioning) -> Tensor:
        """[N,C,...], [N,D] -> [N,C',...]"""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that passes the embedding to those of its children that take one."""

    def forward(self, x: Tensor, emb: Conditioning) -> Tensor:
        """[N,C,...], [N,D] -> [N,C',...]"""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Double height and width by repetition (depth, in 3-D, stays), optionally followed by a convolution."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.dims = dims
        self.use_conv = use_conv
        if use_conv:
            self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C',2H,2W]"""
        factors = (1.0, 2.0, 2.0) if self.dims == 3 else 2.0
        x = F.interpolate(x, scale_factor=factors, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve height and width (depth, in 3-D, stays): a strided convolution, or the mean of each 2x2 square."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C',H/2,W/2]"""
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block conditioned on the time: norm, SiLU, conv, then norm with the embedding, SiLU, dropout, conv.

    :param channels: width of the input.
    :param emb_channels: D, width of the embedding.
    :param out_channels: width of the output, by default `channels`.
    :param use_conv: change the width on the skip path with a 3x3 convolution instead of 1x1.
    :param use_scale_shift_norm: the embedding scales and shifts the second norm's output; otherwise it is added
        before that norm.
    :param up, down: double or halve height and width, on both paths, before the first convolution.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.resample: nn.Module | None = None
        if up:
            self.resample = Upsample(channels, False, dims)
        elif down:
            self.resample = Downsample(channels, False, dims)
        self.emb_layers = nn.Sequential(
            SiLU(), linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            SiLU(),
            Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    @property
    def projection(self) -> nn.Module:
        """From the embedding to a number for each channel, or two."""
        return self.emb_layers

    @property
    def has_gain(self) -> bool:
        """Whether the embedding scales the channels, too."""
        return self.use_scale_shift_norm

    @property
    def modulated_norm(self) -> nn.GroupNorm:
        """The norm whose result the embedding scales and shifts."""
        norm = self.out_layers[0]
        assert isinstance(norm, nn.GroupNorm)
        return norm

    def forward(self, x: Tensor, emb: Conditioning) -> Tensor:
        """[N,C,H,W], [N,D] -> [N,out_channels,H',W']"""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Conditioning) -> Tensor:
        norm_in, _, conv_in = self.in_layers
        assert isinstance(norm_in, nn.GroupNorm)
        h = norm_act(norm_in, x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv_plus(conv_in, h)
        gain, shift, whole = modulation(self, emb, h.dtype)
        _, _, dropout, conv_out = self.out_layers
        if gain is None:
            h = norm_act(self.modulated_norm, h + append_dims(shift.to(h.dtype), h.ndim))
        else:
            h = norm_act(self.modulated_norm, h, gain, shift, whole=whole)
        return conv_plus(conv_out, dropout(h), conv_plus(self.skip_connection, x))
