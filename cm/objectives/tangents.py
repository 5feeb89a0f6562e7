"""Shared code of objectives that differentiate their own network in forward mode.

The derivative is a constant in the loss. It is computed with the bare module, without gradient; the gradient comes from
an ordinary pass through the module that averages gradients over ranks. A derivative with gradient would bypass that
module and leave the ranks with different gradients, without an error. It is computed in float32, because half precision
loses the derivative long before the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from torch import Tensor

from cm.diffusion.denoiser import Diffusion
from cm.errors import UserError
from cm.networks.jvp import jvp
from cm.networks.layers import full_float32
from cm.random_util import SharedDropout
from cm.tensors import append_dims


def derivative(
    f: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], masks: SharedDropout
) -> tuple[Tensor, Tensor]:
    """f and its derivative along the tangents, without gradient, in full precision, with these dropout masks."""
    with th.no_grad(), full_float32(primals[0].device), masks:
        return jvp(f, primals, tangents)


def sample_norm(g: Tensor, kind: str) -> Tensor:
    """The size of each sample's g [N,C,H,W]: [N].

    :param kind: "norm", the root of the sum of squares, or "rms", that of their mean.
    """
    norm = g.flatten(1).norm(dim=1)
    return norm if kind == "norm" else norm / g[0].numel() ** 0.5


def normalized(g: Tensor, c: float, kind: str) -> Tensor:
    """g / (|g| + c) of each sample."""
    return g / append_dims(sample_norm(g, kind) + c, g.ndim)


def check_flags(diffusion: Diffusion, values: Mapping[str, Any]) -> None:
    """Check that the network can be differentiated in forward mode, and has the scalings that the clocks need.

    :raises UserError: if not; the message names the flag.
    """
    mode = f"--training_mode {values['training_mode']}"
    if values["compile"]:
        raise UserError(f"--compile True: {mode} differentiates the network in forward mode, which compiled networks "
                        "do not allow; drop --compile")
    if values["use_fp16"] or values["precision"] == "fp16":
        raise UserError(f"{mode} differentiates the network in float32, which a network in fp16 cannot: give "
                        "--precision bf16 or fp32, and --use_fp16 False")
    if diffusion.precond != "edm":
        raise UserError(f"--precond {diffusion.precond}: {mode} needs EDM's scalings, with a teacher of --precond edm")
