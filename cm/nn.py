"""openai/consistency_models' `cm.nn`: small layers and functions of tensors.

A compatibility module: see `cm.networks.layers`, `cm.tensors` and `cm.diffusion.schedules`.
"""

from __future__ import annotations

import torch as th
from torch import nn

from cm.diffusion.schedules import append_zero
from cm.networks.layers import (
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from cm.tensors import append_dims, mean_flat, update_ema

__all__ = [
    "GroupNorm32", "SiLU", "append_dims", "append_zero", "avg_pool_nd", "checkpoint", "conv_nd", "linear", "mean_flat",
    "normalization", "scale_module", "timestep_embedding", "update_ema", "zero_module",
]


@th.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter of `module` by `scale`, in place, and return the module."""
    for param in module.parameters():
        param.mul_(scale)
    return module
