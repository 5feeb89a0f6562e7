"""The U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233), as the published consistency models use it.

Constructor arguments and parameter names are guided-diffusion's: they are the keys of published checkpoints.

Shapes: N batch, C channels, H and W height and width, D embedding width (4 model_channels).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn

from cm.errors import UserError
from cm.networks.attention import AttentionBlock
from cm.networks.fused_norm import norm_act
from cm.networks.layers import (
    GROUPS,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    without_autocast,
    zero_module,
)
from cm.networks.precision import convert_module_to_f16, convert_module_to_f32
from cm.tensors import append_dims


class TimestepBlock(nn.Module):
    """A module whose forward takes the embedding of the time (and class) as its second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N,C,...], [N,D] -> [N,C',...]"""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that passes the embedding to those of its children that take one."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
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
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N,C,H,W], [N,D] -> [N,out_channels,H',W']"""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm_in, _, conv_in = self.in_layers
        assert isinstance(norm_in, nn.GroupNorm)
        h = norm_act(norm_in, x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv_in(h)
        emb_out = self.emb_layers(emb).to(h.dtype)                  # [N,C], or [N,2C]: scale, then shift
        norm_out, _, dropout, conv_out = self.out_layers
        assert isinstance(norm_out, nn.GroupNorm)
        if self.use_scale_shift_norm:
            h = norm_act(norm_out, h, *emb_out.chunk(2, dim=1))
        else:
            h = norm_act(norm_out, h + append_dims(emb_out, h.ndim))
        return self.skip_connection(x) + conv_out(dropout(h))


@dataclass(frozen=True)
class LayerFactory:
    """Makes the layers of one network from their common options, see UNetModel."""

    emb_channels: int
    dropout: float
    dims: int
    use_checkpoint: bool
    use_scale_shift_norm: bool
    num_head_channels: int
    resblock_updown: bool
    conv_resample: bool

    def block(self, channels: int, width: int, up: bool = False, down: bool = False) -> ResBlock:
        """A residual block of this width; `up` or `down` changes the level."""
        return ResBlock(
            channels, self.emb_channels, self.dropout, width, dims=self.dims, use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm, up=up, down=down,
        )

    def attention(self, channels: int, num_heads: int) -> AttentionBlock:
        """An attention layer; num_head_channels, if it is not -1, has precedence over num_heads."""
        return AttentionBlock(channels, num_heads, self.num_head_channels, self.use_checkpoint, self.dims)

    def downsampling(self, channels: int) -> nn.Module:
        """The layer from a level to the next one on the way down."""
        if self.resblock_updown:
            return self.block(channels, channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims)

    def upsampling(self, channels: int) -> nn.Module:
        """The layer from a level to the next one on the way up."""
        if self.resblock_updown:
            return self.block(channels, channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims)

    def encoder(
        self, in_channels: int, widths: Sequence[int], num_res_blocks: int, factors: Container[int], num_heads: int
    ) -> tuple[nn.ModuleList, list[int]]:
        """The blocks of the way down, and the width of the output of each; attention at the downsampling `factors`."""
        first = conv_nd(self.dims, in_channels, widths[0], 3, padding=1)
        blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        outputs = [widths[0]]
        for level, width in enumerate(widths):
            if level:
                blocks.append(TimestepEmbedSequential(self.downsampling(outputs[-1])))
                outputs.append(outputs[-1])
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [self.block(outputs[-1], width)]
                if 2**level in factors:
                    layers.append(self.attention(width, num_heads))
                blocks.append(TimestepEmbedSequential(*layers))
                outputs.append(width)
        return blocks, outputs

    def middle(self, channels: int, num_heads: int) -> TimestepEmbedSequential:
        """The blocks at the lowest resolution: residual, attention, residual."""
        return TimestepEmbedSequential(
            self.block(channels, channels), self.attention(channels, num_heads), self.block(channels, channels)
        )

    def decoder(
        self, skips: Sequence[int], widths: Sequence[int], num_res_blocks: int, factors: Container[int], num_heads: int
    ) -> nn.ModuleList:
        """The blocks of the way up; each also reads an output of the encoder of the same size, the last one first."""
        waiting = list(skips)
        channels = waiting[-1]
        blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [self.block(channels + waiting.pop(), width)]
                channels = width
                if 2**level in factors:
                    layers.append(self.attention(width, num_heads))
                if level and i == num_res_blocks:
                    layers.append(self.upsampling(width))
                blocks.append(TimestepEmbedSequential(*layers))
        return blocks


class UNetModel(nn.Module):
    """A U-Net with attention and a time (and class) embedding.

    :param image_size: side of the training images; other sizes work too if they can be halved as often.
    :param in_channels: channels of the input.
    :param model_channels: base width; level l is int(channel_mult[l] * model_channels) wide.
    :param out_channels: channels of the output.
    :param num_res_blocks: residual blocks per level (one more on the way up).
    :param attention_resolutions: downsampling FACTORS at which attention takes place (4 means at image_size / 4);
        `attention_factors` makes them from resolutions. Factors of levels this network does not have are harmless.
    :param dropout: probability, inside the residual blocks.
    :param channel_mult: one multiplier per level; the image halves between levels.
    :param conv_resample: learnt convolutions at the changes of level; no effect with `resblock_updown`.
    :param dims: 1, 2 or 3 dimensional signals.
    :param num_classes: makes the network class-conditional.
    :param use_checkpoint: recompute activations in the backward pass, to save memory.
    :param use_fp16: only recorded; the trainer calls `convert_to_fp16` after it has copied the float32 master weights.
    :param num_heads: attention heads per layer, if `num_head_channels` is -1.
    :param num_head_channels: width of a head; -1 uses `num_heads` instead.
    :param num_heads_upsample: number of heads on the way up, if not `num_heads`; no effect with num_head_channels.
    :param use_scale_shift_norm: see ResBlock.
    :param resblock_updown: residual blocks change the level.
    :param use_new_attention_order: has no effect, as in the original: the published networks always have all of q, then
        all of k, then all of v (cm.networks.attention.qkv_attention).
    :raises UserError: for widths that are no multiple of 32, heads that do not divide them, factors that are no power
        of two, images that cannot be halved often enough.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Iterable[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.use_fp16 = use_fp16
        self.dims = dims
        widths = [int(mult * model_channels) for mult in channel_mult]
        self.shrinkage = 2 ** (len(widths) - 1)         # from the first level to the last
        attention = set(attention_resolutions)
        _check_widths(widths, model_channels, channel_mult)
        _check_factors(attention)
        self._check_size((image_size,))

        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            linear(model_channels, emb_channels), SiLU(), linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        make = LayerFactory(
            emb_channels=emb_channels, dropout=dropout, dims=dims, use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm, num_head_channels=num_head_channels,
            resblock_updown=resblock_updown, conv_resample=conv_resample,
        )
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.input_blocks, skip_widths = make.encoder(in_channels, widths, num_res_blocks, attention, num_heads)
        self.middle_block = make.middle(widths[-1], num_heads)
        self.output_blocks = make.decoder(skip_widths, widths, num_res_blocks, attention, heads_up)
        self.out = nn.Sequential(
            normalization(widths[0]), SiLU(), zero_module(conv_nd(dims, widths[0], out_channels, 3, padding=1))
        )

    @property
    def dtype(self) -> th.dtype:
        """The precision of the trunk: float16 after `convert_to_fp16`."""
        return next(self.input_blocks.parameters()).dtype

    def convert_to_fp16(self) -> None:
        """Make the trunk half precision. Norms compute in float32; embeddings and the output layer stay float32."""
        self._convert_trunk(convert_module_to_f16)

    def convert_to_fp32(self) -> None:
        """Make the trunk float32 again."""
        self._convert_trunk(convert_module_to_f32)

    def _convert_trunk(self, convert: Callable[[nn.Module], None]) -> None:
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            part.apply(convert)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Apply the network.

        :param x: [N,in_channels,H,W], where H and W can be halved between all levels; they need not be image_size.
        :param timesteps: [N], such as 250 ln(sigma).
        :param y: [N] class labels, for a class-conditional network and no other.
        :return: [N,out_channels,H,W] in the dtype of x; channels_last if x or the weights are.
        :raises ValueError: if an input does not fit the network.
        """
        self._check_inputs(x, y)
        emb = self._embed(timesteps, y)
        h = x.to(self.dtype)
        skips = []
        for module in self.input_blocks:
            h = module(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(th.cat([h, skips.pop()], dim=1), emb)
        with without_autocast(x.device):        # the cost is small, and the output is not rounded
            norm, _, conv = self.out
            assert isinstance(norm, nn.GroupNorm)
            return conv(norm_act(norm, h.to(next(conv.parameters()).dtype))).to(x.dtype)

    def _embed(self, timesteps: Tensor, y: Tensor | None) -> Tensor:
        """[N], labels [N] -> [N,D]. Not under autocast, whose half precision would merge neighbouring noise levels."""
        with without_autocast(timesteps.device):
            waves = timestep_embedding(timesteps, self.model_channels)
            emb = self.time_embed(waves.to(next(self.time_embed.parameters()).dtype))
            if y is None:
                return emb
            try:
                return emb + self.label_emb(y)
            except IndexError:
                classes = self.label_emb.num_embeddings
                raise ValueError(f"a label in y is not one of the {classes} classes, 0 to {classes - 1}: "
                                 f"{y.tolist()}") from None

    def _check_inputs(self, x: Tensor, y: Tensor | None) -> None:
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, the network expects [N, {self.in_channels}, ...] with "
                             f"{self.dims} axes of positions")
        self._check_size(x.shape[-min(self.dims, 2):])
        if y is None and self.num_classes is not None:
            raise ValueError(f"the network is class-conditional: give y, one label below {self.num_classes} per sample")
        if y is not None and self.num_classes is None:
            raise ValueError("the network is not class-conditional: call it without y, or build it with num_classes")
        if y is not None and y.shape != x.shape[:1]:
            raise ValueError(f"y has shape {tuple(y.shape)}, but x holds {x.shape[0]} samples: give one label each")

    def _check_size(self, sides: Sequence[int]) -> None:
        for side in sides:
            if side < 1 or side % self.shrinkage:
                levels = self.shrinkage.bit_length()
                raise UserError(f"images of side {side} cannot be halved between the {levels} levels of the network: "
                                f"use a multiple of {self.shrinkage}, or a channel_mult with fewer levels")


def attention_factors(image_size: int, resolutions: Iterable[int], levels: int | None = None) -> tuple[int, ...]:
    """Downsampling factors for `UNetModel` from the resolutions at which attention takes place: 16, 8 at 32 -> 2, 4.

    :param levels: number of levels of the network; resolutions below the last one are then errors, too.
    :raises UserError: for a resolution that halving the image never reaches; the message lists those it does.
    """
    reached = {}
    while image_size % 2 ** len(reached) == 0 and len(reached) != levels:
        reached[image_size >> len(reached)] = 2 ** len(reached)
    resolutions = tuple(resolutions)
    for resolution in resolutions:
        if resolution not in reached:
            raise UserError(f"no attention is possible at resolution {resolution}: a network for images of side "
                            f"{image_size} works at {', '.join(map(str, reached))}")
    return tuple(reached[resolution] for resolution in resolutions)


def _check_widths(widths: Sequence[int], model_channels: int, channel_mult: Sequence[float]) -> None:
    if not widths:
        raise UserError("channel_mult is empty; give one multiplier per level, such as 1,2,4")
    for level, width in enumerate(widths):
        if width <= 0 or width % GROUPS:
            raise UserError(f"level {level} would be {width} channels wide (num_channels {model_channels} times "
                            f"channel_mult {channel_mult[level]:g}); widths must be multiples of {GROUPS}")


def _check_factors(factors: Iterable[int]) -> None:
    for factor in factors:
        if factor < 1 or factor & (factor - 1):
            raise UserError(f"attention at downsampling factor {factor} is impossible, factors are 1, 2, 4, ...; "
                            "attention_factors() makes them from resolutions")
