"""Self-attention over the positions of an image, on torch's scaled_dot_product_attention.

Shapes: N batch, C channels, T positions (H times W), h heads, d head width (C = h d).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm.errors import UserError
from cm.networks import attention_cpu
from cm.networks.fused_conv import conv_plus
from cm.networks.fused_norm import norm_act
from cm.networks.jvp import inside_jvp
from cm.networks.layers import checkpoint, conv_nd, normalization, without_autocast, zero_module


def _differentiable_kernel() -> AbstractContextManager:
    """Choose torch's plain kernel inside forward-mode differentiation, for which its fused kernels have no rule."""
    if inside_jvp():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def qkv_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Softmax attention with logits scaled by 1/sqrt(d): [N,3C,...] -> [N,C,...].

    The 3C channels are all queries, then all keys, then all values, each as h heads of d channels: the layout of the
    published consistency models. The result is channels-last in memory.
    """
    n, width, *positions = qkv.shape
    d = width // (3 * num_heads)
    # The fused kernels need the d numbers of a head contiguous in memory. With channels_last data they are, and this
    # contiguous() is free; with channels-first data the copy is three times faster than strided attention.
    tokens = qkv.flatten(2).transpose(1, 2).contiguous()                        # [N,T,3C]
    with _differentiable_kernel(), without_autocast(qkv.device):
        if attention_cpu.suits(tokens):
            out = attention_cpu.attention(tokens, num_heads)                    # [N,T,C]
        else:
            q, k, v = tokens.view(n, -1, 3, num_heads, d).permute(2, 0, 3, 1, 4)    # each [N,h,T,d]
            out = F.scaled_dot_product_attention(q, k, v)                       # [N,h,T,d]
            out = out.transpose(1, 2).reshape(n, -1, width // 3)
    return out.transpose(1, 2).unflatten(2, positions)                          # channels innermost


class AttentionBlock(nn.Module):
    """x + proj_out(attention(qkv(norm(x)))): attention among all positions of an image, [N,C,...] -> same.

    Parameters are named and shaped as in the published checkpoints: `norm`, `qkv` [3C,C,1,1], `proj_out` [C,C,1,1],
    the last one initialised to zero, so that a new block is the identity.

    :param num_head_channels: width of a head; -1 splits the channels into `num_heads` heads instead.
    :raises UserError: if the heads do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(dims, channels, 3 * channels, 1)
        self.proj_out = zero_module(conv_nd(dims, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,...] -> same."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        h = norm_act(self.norm, x, silu=False)
        qkv = conv_plus(self.qkv, h, memory_format=th.channels_last)        # as attention reads it
        return conv_plus(self.proj_out, qkv_attention(qkv, self.num_heads), x)


def count_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    """The number of heads of an attention layer: from `num_head_channels` unless that is -1, else `num_heads`.

    :raises UserError: if the heads do not divide `channels`.
    """
    if num_head_channels == -1:
        if num_heads < 1 or channels % num_heads:
            raise UserError(f"num_heads={num_heads} does not divide the {channels} channels of an attention layer")
        return num_heads
    if num_head_channels < 1 or channels % num_head_channels:
        raise UserError(f"num_head_channels={num_head_channels} does not divide the {channels} channels of an "
                        "attention layer; choose a common divisor of all widths with attention, or -1 for num_heads")
    return channels // num_head_channels
