"""A convolution and what is added to its result: in few passes through memory where the device allows it."""

from __future__ import annotations

from typing import TypeGuard

import torch as th
from torch import Tensor, nn

from cm.networks import gpu_layouts


def conv_plus(
    conv: nn.Module, x: Tensor, *others: Tensor, memory_format: th.memory_format = th.contiguous_format
) -> Tensor:
    """conv(x), plus the others [N,C',H',W']: [N,C,H,W] -> [N,C',H',W'].

    :param memory_format: of the result on GPUs without gradients; contiguous is what a norm wants.
    """
    if gpu_layouts.suits(x) and _is_plain(conv):
        return gpu_layouts.conv_plus(conv, x, *others, memory_format=memory_format)
    result = conv(x)
    for other in others:
        result = other + result
    return result


def _is_plain(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is torch's own layer, and nothing watches its calls."""
    return type(conv) is nn.Conv2d and not conv._forward_hooks and not conv._forward_pre_hooks
