"""Convolutions of a network in half or single precision."""

from __future__ import annotations

import torch as th
from torch import nn


def convert_module_to_f16(module: nn.Module) -> None:
    """Make a convolution half precision; for `nn.Module.apply`. Norms and embeddings stay as they are."""
    _convert_convolution(module, th.float16)


def convert_module_to_f32(module: nn.Module) -> None:
    """Make a convolution single precision; for `nn.Module.apply`."""
    _convert_convolution(module, th.float32)


def _convert_convolution(module: nn.Module, dtype: th.dtype) -> None:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        for param in module.parameters(recurse=False):              # buffers keep their precision
            param.data = param.data.to(dtype)
