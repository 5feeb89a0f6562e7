"""Group normalisation, scale and shift by an embedding, and SiLU as one operation.

On CPUs torch's group normalisation of channels-last data is up to ten times slower in bfloat16 than its other passes,
and the three operations keep three activations for the backward pass where one is enough. Here only the input is kept,
sums are taken over complete rows of channels, and all arithmetic is in float32 (float64 for float64 data), a few images
at a time, so that intermediate values stay in the cache.

Shapes: N batch, B images of a block, C channels, G groups, H and W height and width, M = H W C / G numbers of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cm.networks import gpu_layouts
from cm.networks.jvp import inside_jvp, inside_transform
from cm.networks.layers import silu as plain_silu
from cm.tensors import append_dims

BLOCK = 2**20                                               # numbers processed at a time: 4 MiB of float32


def norm_act(norm: nn.GroupNorm, x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None,
             *, silu: bool = True, whole: bool = False) -> Tensor:
    """silu(norm(x) gain + shift), or without silu: [N,C,...] -> same, in the dtype of x.

    :param norm: its weights, number of groups and eps are used.
    :param gain, shift: [N,C]; neither or both.
    :param whole: gain and shift take the place of the weights of the norm.
    """
    if gpu_layouts.suits(x):
        return gpu_layouts.norm_act(norm, x, *_affine_of(norm, gain, shift, whole), silu=silu)
    if not _is_fused(x):
        # torch's forward-mode rule does not support channels-last data
        x = x.contiguous() if inside_jvp() else x
        y = _x_hat(norm, x) if whole else norm(x)
        if gain is not None and shift is not None:
            y = th.addcmul(append_dims(shift.to(y.dtype), y.ndim), y, append_dims(gain.to(y.dtype), y.ndim))
        return plain_silu(y) if silu else y
    dtype = th.promote_types(x.dtype, th.float32)
    with th.autocast("cpu", enabled=False):
        a, b = (t.to(dtype).expand(len(x), -1) for t in _affine_of(norm, gain, shift, whole))       # [N,C]
        return _NormAct.apply(x, a, b, norm.num_groups, norm.eps, silu)


def _x_hat(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Mean 0 and variance 1 in each group."""
    wide = x.to(th.promote_types(x.dtype, th.float32))
    return F.group_norm(wide, norm.num_groups, eps=norm.eps).to(x.dtype)


def _affine_of(
    norm: nn.GroupNorm, gain: Tensor | None, shift: Tensor | None, whole: bool
) -> tuple[Tensor, Tensor]:
    """What multiplies and what is added to normalised data, in float32 at least: [C] or [N,C] each."""
    if gain is None or shift is None:
        return norm.weight, norm.bias
    if whole:
        return gain, shift
    gain = gain.to(th.promote_types(gain.dtype, th.float32))
    return norm.weight * gain, th.addcmul(shift.to(gain.dtype), norm.bias, gain)


def _is_fused(x: Tensor) -> bool:
    """Whether x is channels-last data on a CPU, outside of compilers and transforms, which use torch's operations."""
    return (
        not th.compiler.is_compiling() and x.device.type == "cpu" and x.ndim == 4
        and x.is_contiguous(memory_format=th.channels_last) and not inside_transform()
    )


class _NormAct(th.autograd.Function):
    """x [N,C,H,W], a and b [N,C] -> silu(a x_hat + b), where x_hat has mean 0 and variance 1 in each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        if x.dtype == a.dtype:
            # Without conversions there are so few passes through memory that blocks do not pay.
            y, mean, rstd = _normalise(x, a, b, groups, eps, silu)
        else:
            y, mean, rstd = th.empty_like(x), a.new_empty(len(x), groups), a.new_empty(len(x), groups)
            for part in _blocks(x):
                y[part], mean[part], rstd[part] = _normalise(x[part].to(a.dtype), a[part], b[part], groups, eps, silu)
        ctx.save_for_backward(x, a, b, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=th.channels_last)
        grad_x = th.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = th.empty_like(a), th.empty_like(b)
        for part in _blocks(x):
            wide, slope = x[part].to(a.dtype), grad[part].to(a.dtype)
            gain, offset = _affine(a[part], b[part], mean[part], rstd[part])
            if ctx.silu:
                slope = th.ops.aten.silu_backward(slope, th.addcmul(offset, wide, gain))
            rows = _rows(slope)
            grad_b[part] = rows.sum(1)
            with_x = (rows * _rows(wide)).sum(1)                    # [B,C], sum of dy x
            mean_c, rstd_c = (_of_channels(t[part], a.shape[1]) for t in (mean, rstd))
            grad_a[part] = (with_x - mean_c * grad_b[part]) * rstd_c
            if grad_x is not None:
                factors = _against_moments(a[part], grad_a[part], grad_b[part], mean[part], rstd[part], rows.shape[1])
                grad_x[part] = th.addcmul(*factors, wide).addcmul_(slope, gain)
        return grad_x, grad_a, grad_b, None, None, None


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the images of x, each of about `BLOCK` numbers."""
    step = max(1, BLOCK // x[0].numel())
    return (slice(start, start + step) for start in range(0, len(x), step))


def _rows(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,HW,C], the same memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _normalise(
    x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """silu(a x_hat + b), and the mean and 1 / standard deviation of each group [B,G]."""
    mean, rstd = _moments(x, groups, eps)
    gain, offset = _affine(a, b, mean, rstd)
    y = th.addcmul(offset, x, gain)
    return F.silu(y, inplace=True) if silu else y, mean, rstd


def _moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each group: [B,C,H,W] -> [B,G] twice."""
    rows = _rows(x)
    count = rows.shape[1] * (rows.shape[2] // groups)               # M
    mean = _of_groups(rows.sum(1), groups) / count
    square = _of_groups(rows.square().sum(1), groups) / count
    return mean, (square - mean.square()).clamp_(min=0).add_(eps).rsqrt_()


def _against_moments(
    a: Tensor, grad_a: Tensor, grad_b: Tensor, mean: Tensor, rstd: Tensor, positions: int
) -> tuple[Tensor, Tensor]:
    """The terms of mean and variance in the gradient of x: a constant and a factor of x, both [B,C,1,1].

    dx = rstd (a dy - <a dy> - x_hat <a dy x_hat>), where <> is the mean over a group.
    """
    channels, groups = a.shape[1], mean.shape[1]
    count = positions * (channels // groups)
    along = _of_groups(a * grad_a, groups) / count                  # [B,G]
    level = _of_groups(a * grad_b, groups) / count
    factor = -along * rstd.square()
    constant = -rstd * level - factor * mean
    return _as_image(_of_channels(constant, channels)), _as_image(_of_channels(factor, channels))


def _affine(a: Tensor, b: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """a x_hat + b = gain x + offset, both [B,C,1,1]."""
    mean_c, gain = _of_channels(mean, a.shape[1]), a * _of_channels(rstd, a.shape[1])
    return _as_image(gain), _as_image(th.addcmul(b, gain, mean_c, value=-1))


def _of_groups(per_channel: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group: [B,C] -> [B,G]."""
    return per_channel.unflatten(1, (groups, -1)).sum(2)


def _of_channels(per_group: Tensor, channels: int) -> Tensor:
    """[B,G] -> [B,C]."""
    return per_group.repeat_interleave(channels // per_group.shape[1], 1)


def _as_image(per_channel: Tensor) -> Tensor:
    return per_channel[:, :, None, None]
