"""Layers of networks on GPUs without gradients: memory formats change in operations that run anyway.

There torch's convolutions want channels-last data, and add their bias in an operation of its own; its group
normalisation wants channels-first data. If each layer is called alone, every one copies its input. Here the addition
after a convolution writes channels-first data, and the SiLU after a norm channels-last data, and neither is copied.

Shapes: N batch, C channels, G groups, H and W height and width.
"""

from __future__ import annotations

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn

from cm.networks.jvp import inside_transform


def suits(x: Tensor) -> bool:
    """Whether these layers are for x: images on a GPU, no gradients, and no compiler or transform, which go first."""
    return (
        not th.compiler.is_compiling() and x.device.type != "cpu" and x.ndim == 4
        and not th.is_grad_enabled() and not inside_transform()
    )


def norm_act(norm: nn.GroupNorm, x: Tensor, weight: Tensor, bias: Tensor, *, silu: bool) -> Tensor:
    """silu(weight x_hat + bias), channels-last, or without silu, channels-first: [N,C,H,W] -> same.

    :param weight, bias: [C], or [N,C] for weights that differ between images.
    """
    wide = x.to(th.promote_types(x.dtype, th.float32), memory_format=th.contiguous_format)
    weight, bias = weight.to(wide.dtype), bias.to(wide.dtype)
    if weight.ndim == 1:
        y = F.group_norm(wide, norm.num_groups, weight, bias, norm.eps)
    else:                                                           # N images are one image of N G groups
        row = wide.flatten(0, 1)[None]                              # [1,NC,H,W]
        y = F.group_norm(row, len(x) * norm.num_groups, weight.flatten(), bias.flatten(), norm.eps).view_as(wide)
    if not silu:
        return y.to(x.dtype)
    result = th.empty_like(x, memory_format=th.channels_last)
    if x.dtype == y.dtype:
        return th.ops.aten.silu.out(y, out=result)
    return F.silu(result.copy_(y), inplace=True)                    # silu writes its own dtype only


def conv_plus(conv: nn.Conv2d, x: Tensor, *others: Tensor, memory_format: th.memory_format) -> Tensor:
    """The convolution of x plus the others, which have its result's shape or can be expanded to it."""
    weight = conv.weight
    if conv.kernel_size == (1, 1):
        weight = weight.flatten(1)[..., None, None]                 # has either format; torch goes by its strides
    y = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    terms = [*others] if conv.bias is None else [conv.bias[:, None, None], *others]
    out = th.empty_like(y, memory_format=memory_format)
    if not terms:
        return out.copy_(y)
    th.add(y, terms[0], out=out)
    for term in terms[1:]:
        out += term
    return out
