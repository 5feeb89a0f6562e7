"""The U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233), as the published consistency models use it.

Options and parameters have guided-diffusion's names: the latter are the keys of published checkpoints.

Shapes: N batch, C channels, H and W height and width, D embedding width (4 model_channels).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch as th
from torch import Tensor, nn

from cm.errors import UserError
from cm.networks.attention import AttentionBlock
from cm.networks.fused_norm import norm_act
from cm.networks.held import Holds
from cm.networks.layers import (
    GROUPS,
    SiLU,
    conv_nd,
    linear,
    normalization,
    silu,
    timestep_embedding,
    without_autocast,
    zero_module,
)
from cm.networks.modulation import Conditioning, JointModulation, can_join
from cm.networks.precision import HalfPrecisionTrunk
from cm.networks.second_time import SecondTime, check_gap
from cm.networks.unet_blocks import Downsample, ResBlock, TimestepEmbedSequential, Upsample


@dataclass(frozen=True)
class UNetConfig:
    """What a U-Net is built from, by guided-diffusion's names.

    :param image_size: side of the training images; other sizes work too if they can be halved as often.
    :param in_channels: channels of the input.
    :param model_channels: base width; level l is int(channel_mult[l] * model_channels) wide.
    :param out_channels: channels of the output.
    :param num_res_blocks: residual blocks per level (one more on the way up).
    :param attention_resolutions: downsampling FACTORS at which attention takes place (4 means at image_size / 4);
        `attention_factors` makes them from resolutions. Factors of levels this network does not have are harmless.
    :param dropout: probability, inside the residual blocks.
    :param dropout_resolutions: sides of the training images' levels whose blocks have dropout; empty: all.
    :param channel_mult: one multiplier per level; the image halves between levels.
    :param conv_resample: learnt convolutions at the changes of level; no effect with `resblock_updown`.
    :param dims: 1, 2 or 3 dimensional signals.
    :param num_classes: makes the network class-conditional.
    :param null_class: it also knows the label num_classes, which stands for no class; a row more in its embedding.
    :param second_time: the network takes a second time, as flow maps do.
    :param use_checkpoint: recompute activations in the backward pass, to save memory.
    :param num_heads: attention heads per layer, if `num_head_channels` is -1.
    :param num_head_channels: width of a head; -1 uses `num_heads` instead.
    :param num_heads_upsample: number of heads on the way up, if not `num_heads`; no effect with num_head_channels.
    :param use_scale_shift_norm: see ResBlock.
    :param resblock_updown: residual blocks change the level.
    :raises UserError: for widths that are no multiple of 32, factors that are no power of two.
    """

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: Collection[int]
    dropout: float = 0
    channel_mult: Sequence[float] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    num_classes: int | None = None
    use_checkpoint: bool = False
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    null_class: bool = False
    second_time: bool = False
    dropout_resolutions: Collection[int] = ()

    def __post_init__(self) -> None:
        _check_widths(self.widths, self.model_channels, self.channel_mult)
        _check_factors(self.attention_resolutions)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    @property
    def emb_channels(self) -> int:
        """Width of the embedding of time and class."""
        return 4 * self.model_channels

    def dropout_at(self, level: int) -> float:
        """The probability in a block whose output has this level."""
        here = not self.dropout_resolutions or self.image_size >> level in self.dropout_resolutions
        return self.dropout if here else 0


@dataclass(frozen=True)
class LayerFactory:
    """Makes the layers of one network from their common options."""

    config: UNetConfig

    def block(self, channels: int, width: int, level: int, up: bool = False, down: bool = False) -> ResBlock:
        """A residual block of this width, whose output has this level; `up` or `down` changes from another."""
        c = self.config
        return ResBlock(
            channels, c.emb_channels, c.dropout_at(level), width, dims=c.dims, use_checkpoint=c.use_checkpoint,
            use_scale_shift_norm=c.use_scale_shift_norm, up=up, down=down,
        )

    def attention(self, channels: int, num_heads: int) -> AttentionBlock:
        """An attention layer; num_head_channels, if it is not -1, has precedence over num_heads."""
        c = self.config
        return AttentionBlock(channels, num_heads, c.num_head_channels, c.use_checkpoint, c.dims)

    def downsampling(self, channels: int, level: int) -> nn.Module:
        """The layer to a level from the one before, on the way down."""
        if self.config.resblock_updown:
            return self.block(channels, channels, level, down=True)
        return Downsample(channels, self.config.conv_resample, self.config.dims)

    def upsampling(self, channels: int, level: int) -> nn.Module:
        """The layer to a level from the one after, on the way up."""
        if self.config.resblock_updown:
            return self.block(channels, channels, level, up=True)
        return Upsample(channels, self.config.conv_resample, self.config.dims)

    def blocks(self, channels: int, level: int, num_heads: int) -> list[nn.Module]:
        """A residual block of a level, and attention where the configuration asks for it."""
        width = self.config.widths[level]
        layers: list[nn.Module] = [self.block(channels, width, level)]
        if 2**level in self.config.attention_resolutions:
            layers.append(self.attention(width, num_heads))
        return layers

    def encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """The blocks of the way down, and the width of the output of each."""
        c = self.config
        first = conv_nd(c.dims, c.in_channels, c.widths[0], 3, padding=1)
        blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        outputs = [c.widths[0]]
        for level, width in enumerate(c.widths):
            if level:
                blocks.append(TimestepEmbedSequential(self.downsampling(outputs[-1], level)))
                outputs.append(outputs[-1])
            for _ in range(c.num_res_blocks):
                blocks.append(TimestepEmbedSequential(*self.blocks(outputs[-1], level, c.num_heads)))
                outputs.append(width)
        return blocks, outputs

    def middle(self) -> TimestepEmbedSequential:
        """The blocks at the lowest resolution: residual, attention, residual."""
        channels, level = self.config.widths[-1], len(self.config.widths) - 1
        return TimestepEmbedSequential(
            self.block(channels, channels, level), self.attention(channels, self.config.num_heads),
            self.block(channels, channels, level),
        )

    def decoder(self, skips: Sequence[int]) -> nn.ModuleList:
        """The blocks of the way up; each also reads an output of the encoder of the same size, the last one first."""
        c = self.config
        num_heads = c.num_heads if c.num_heads_upsample == -1 else c.num_heads_upsample
        waiting = list(skips)
        channels = waiting[-1]
        blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(c.widths))):
            for i in range(c.num_res_blocks + 1):
                layers = self.blocks(channels + waiting.pop(), level, num_heads)
                channels = width
                if level and i == c.num_res_blocks:
                    layers.append(self.upsampling(width, level - 1))
                blocks.append(TimestepEmbedSequential(*layers))
        return blocks


class UNet(HalfPrecisionTrunk, Holds):
    """A U-Net with attention and a time (and class) embedding.

    :param config: what it is built from.
    :raises UserError: for heads that do not divide the widths, images that cannot be halved often enough.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.in_channels = config.in_channels
        self.model_channels = config.model_channels
        self.out_channels = config.out_channels
        self.num_classes = config.num_classes
        self.dims = config.dims
        self.shrinkage = 2 ** (len(config.widths) - 1)          # from the first level to the last
        self._check_size((config.image_size,))

        emb_channels = config.emb_channels
        self.time_embed = nn.Sequential(
            linear(config.model_channels, emb_channels), SiLU(), linear(emb_channels, emb_channels)
        )
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes + config.null_class, emb_channels)

        self.second_time = SecondTime(config.model_channels, emb_channels) if config.second_time else None

        make = LayerFactory(config)
        self.input_blocks, skip_widths = make.encoder()
        self.middle_block = make.middle()
        self.output_blocks = make.decoder(skip_widths)
        width = config.widths[0]
        self.out = nn.Sequential(
            normalization(width), SiLU(), zero_module(conv_nd(config.dims, width, config.out_channels, 3, padding=1))
        )

    def trunk(self) -> Iterable[nn.Module]:
        """All but the embeddings and the output layer."""
        return self.input_blocks, self.middle_block, self.output_blocks

    def to_hold(self) -> JointModulation | None:
        """The projections of the embedding, joined; None if one of them is not plain."""
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        return JointModulation(blocks, silu) if blocks and all(map(can_join, blocks)) else None

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, gap: Tensor | None = None
    ) -> Tensor:
        """Apply the network.

        :param x: [N,in_channels,H,W], where H and W can be halved between all levels; they need not be image_size.
        :param timesteps: [N], such as 250 ln(sigma).
        :param y: [N] class labels, for a class-conditional network and no other; num_classes is the null class, where
            the network has one.
        :param gap: [N], see `SecondTime`, for a network with a second time and no other.
        :return: [N,out_channels,H,W] in the dtype of x; channels_last if x or the weights are.
        :raises ValueError: if an input does not fit the network.
        """
        self._check_inputs(x, y)
        emb: Conditioning = self._embed(timesteps, y, gap)
        if self.held is not None:
            emb = self.held(emb)
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

    def _embed(self, timesteps: Tensor, y: Tensor | None, gap: Tensor | None = None) -> Tensor:
        """[N], labels [N] -> [N,D]. Not under autocast, whose half precision would merge neighbouring noise levels."""
        with without_autocast(timesteps.device):
            waves = timestep_embedding(timesteps, self.model_channels)
            emb = self.time_embed(waves.to(next(self.time_embed.parameters()).dtype))
            check_gap(gap, self.second_time)
            if self.second_time is not None:
                emb = emb + self.second_time(gap, emb)
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


def attention_factors(
    image_size: int, resolutions: Iterable[int], levels: int | None = None, what: str = "attention"
) -> tuple[int, ...]:
    """Downsampling factors for `UNetConfig` from the resolutions at which attention takes place: 16, 8 at 32 -> 2, 4.

    :param levels: number of levels of the network; resolutions below the last one are then errors, too.
    :param what: takes place there, for the message.
    :raises UserError: for a resolution that halving the image never reaches; the message lists those it does.
    """
    reached = {}
    while image_size % 2 ** len(reached) == 0 and len(reached) != levels:
        reached[image_size >> len(reached)] = 2 ** len(reached)
    resolutions = tuple(resolutions)
    for resolution in resolutions:
        if resolution not in reached:
            raise UserError(f"no {what} is possible at resolution {resolution}: a network for images of side "
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
