"""openai/consistency_models' `cm.unet`: the U-Net and its layers, and attention as layers of their own.

A compatibility module: the network is in `cm.networks.unet`, its attention in `cm.networks.attention`. What stands
here serves code that was written against the original.

Shapes: N batch, C channels, T positions, h heads, d head width (C = h d).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn

from cm.config.arguments import method_takes_fields, shared_fields
from cm.networks.attention import AttentionBlock, qkv_attention
from cm.networks.layers import conv_nd
from cm.networks.unet import UNet, UNetConfig
from cm.networks.unet_blocks import Downsample, ResBlock, TimestepBlock, TimestepEmbedSequential, Upsample

__all__ = [
    "AttentionBlock", "AttentionPool2d", "Downsample", "QKVAttention", "QKVAttentionLegacy", "ResBlock",
    "TimestepBlock", "TimestepEmbedSequential", "UNetModel", "Upsample", "count_flops_attn",
]


@dataclass(frozen=True)
class UNetModelArguments:
    """openai/consistency_models' argument list of `UNetModel`; `UNetConfig` explains it.

    :param use_fp16: only recorded; the trainer calls `convert_to_fp16` after it has copied the float32 master weights.
    :param use_new_attention_order: has no effect, as in the original: the published networks always have all of q, then
        all of k, then all of v (cm.networks.attention.qkv_attention).
    """

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: Iterable[int]
    dropout: float = UNetConfig.dropout
    channel_mult: Sequence[float] = UNetConfig.channel_mult
    conv_resample: bool = UNetConfig.conv_resample
    dims: int = UNetConfig.dims
    num_classes: int | None = UNetConfig.num_classes
    use_checkpoint: bool = UNetConfig.use_checkpoint
    use_fp16: bool = False
    num_heads: int = UNetConfig.num_heads
    num_head_channels: int = UNetConfig.num_head_channels
    num_heads_upsample: int = UNetConfig.num_heads_upsample
    use_scale_shift_norm: bool = UNetConfig.use_scale_shift_norm
    resblock_updown: bool = UNetConfig.resblock_updown
    use_new_attention_order: bool = False


class UNetModel(UNet):
    """`cm.networks.unet.UNet`, called with `UNetModelArguments`.

    :raises UserError: as `UNetConfig` and `UNet`.
    """

    use_fp16 = False

    @method_takes_fields(UNetModelArguments)
    def __init__(self, arguments: UNetModelArguments) -> None:
        factors = tuple(arguments.attention_resolutions)
        super().__init__(UNetConfig(**shared_fields(UNetConfig, replace(arguments, attention_resolutions=factors))))
        self.use_fp16 = arguments.use_fp16

    @classmethod
    def of(cls, config: UNetConfig) -> UNetModel:
        """The network of a configuration, as an instance of this class."""
        model = cls.__new__(cls)
        UNet.__init__(model, config)
        return model


def count_flops_attn(model: nn.Module, _x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> None:
    """Add an attention layer's multiply-adds to `model.total_ops`: the counter that the package thop asks for.

    :param _x: the layer's inputs, which do not matter.
    :param y: the layer's outputs, of which the first is [N,C,...]; two products of T x T x C each are counted.
    """
    n, channels, *positions = y[0].shape
    counted = 2.0 * n * math.prod(positions) ** 2 * channels
    model.total_ops = th.as_tensor(model.total_ops) + th.tensor([counted], dtype=th.float64)


class QKVAttention(nn.Module):
    """Softmax attention with logits scaled by 1/sqrt(d); the rows are all queries, then all keys, then all values.

    :param n_heads: h.
    """

    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor, encoder_kv: Tensor | None = None) -> Tensor:
        """[N,3C,T] -> [N,C,T].

        :param encoder_kv: [N,2C,S], keys and values of S more positions that every query looks at.
        :raises ValueError: if the heads do not divide the channels, or encoder_kv has another number of them.
        """
        width = qkv.shape[1]
        if width % (3 * self.n_heads):
            raise ValueError(f"qkv has {width} channels, which are not 3 times a multiple of the {self.n_heads} heads")
        if encoder_kv is None:
            return qkv_attention(qkv, self.n_heads)
        if encoder_kv.shape[1] != 2 * width // 3:
            raise ValueError(f"encoder_kv has {encoder_kv.shape[1]} channels; with {width} of qkv it needs "
                             f"{2 * width // 3}")
        q, k, v = qkv.chunk(3, dim=1)
        more_k, more_v = encoder_kv.chunk(2, dim=1)
        q, k, v = (
            part.unflatten(1, (self.n_heads, -1)).transpose(2, 3)                   # [N,h,T,d], [N,h,S+T,d] twice
            for part in (q, th.cat([more_k, k], dim=2), th.cat([more_v, v], dim=2))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)


class QKVAttentionLegacy(nn.Module):
    """As `QKVAttention` without an encoder; the original has the rows in the same order under both names.

    guided-diffusion's layer of this name, whose rows go head by head, is another one.

    :param n_heads: h.
    """

    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.attention = QKVAttention(n_heads)

    def forward(self, qkv: Tensor) -> Tensor:
        """[N,3C,T] -> [N,C,T]."""
        return self.attention(qkv)


class AttentionPool2d(nn.Module):
    """One vector per image by attention: the mean of all positions asks, all positions answer. As in CLIP.

    Parameters are named as in the original: `positional_embedding` [C,T+1], `qkv_proj`, `c_proj`.

    :param spacial_dim: side of the square input, so that T = spacial_dim^2.
    :param embed_dim: C.
    :param num_heads_channels: d.
    :param output_dim: width of the result; C where it is None.
    """

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None):
        super().__init__()
        positions = th.randn(embed_dim, spacial_dim**2 + 1) / math.sqrt(embed_dim)
        self.positional_embedding = nn.Parameter(positions)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,spacial_dim,spacial_dim] -> [N,output_dim]."""
        tokens = x.flatten(2)                                                       # [N,C,T]
        tokens = th.cat([tokens.mean(2, keepdim=True), tokens], dim=2)              # [N,C,T+1], the mean first
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        return self.c_proj(self.attention(self.qkv_proj(tokens)))[..., 0]
