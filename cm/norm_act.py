"""Group normalisation, scale and shift by an embedding, and SiLU as one operation.

On CPUs torch's group normalisation of channels-last data is up to ten times slower in bfloat16 than its other passes,
and the three operations keep three activations for the backward pass where one is enough. Here the input alone is
kept, sums are taken over whole rows of channels, and all arithmetic is in float32 (float64 for float64 data).

Shapes: N batch, C channels, G groups, H and W height and width, M = H W C / G numbers of a group.
"""

from __future__ import annotations

from typing import Any

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cm.forward_ad import inside_jvp, inside_transform
from cm.nn import append_dims
from cm.nn import silu as plain_silu


def norm_act(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
             *, silu: bool = True) -> Tensor:
    """silu(norm(x) (1 + scale) + shift), or without silu: [N,C,...] -> same, in the dtype of x.

    :param scale, shift: [N,C]; neither or both.
    """
    if not _is_fused(x):
        # torch's forward-mode rule takes no channels-last data
        y = norm(x.contiguous() if inside_jvp() else x)
        if scale is not None:
            y = th.addcmul(append_dims(shift.to(y.dtype), y.ndim), y, 1 + append_dims(scale.to(y.dtype), y.ndim))
        return plain_silu(y) if silu else y
    dtype = th.promote_types(x.dtype, th.float32)
    with th.autocast("cpu", enabled=False):
        a = norm.weight.to(dtype).expand(len(x), -1)                # [N,C]
        b = norm.bias.to(dtype).expand(len(x), -1)
        if scale is not None:
            gain = 1 + scale.to(dtype)
            a, b = a * gain, th.addcmul(shift.to(dtype), b, gain)
        return _NormAct.apply(x, a, b, norm.num_groups, norm.eps, silu)


def _is_fused(x: Tensor) -> bool:
    """Whether the rows of channels lie side by side, on a CPU; transforms take torch's own operations."""
    return (
        not th.compiler.is_compiling() and x.device.type == "cpu" and x.ndim == 4
        and x.is_contiguous(memory_format=th.channels_last) and not inside_transform()
    )


class _NormAct(th.autograd.Function):
    """x [N,C,H,W], a and b [N,C] -> silu(a x_hat + b), where x_hat has mean 0 and variance 1 in each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        wide = x.to(a.dtype)
        rows = wide.permute(0, 2, 3, 1).flatten(1, 2)               # [N,HW,C], the same memory
        count = rows.shape[1] * (rows.shape[2] // groups)           # M
        mean = _of_groups(rows.sum(1), groups) / count              # [N,G]
        square = _of_groups(rows.square().sum(1), groups) / count
        rstd = (square - mean.square()).clamp_(min=0).add_(eps).rsqrt_()
        gain, offset = _affine(a, b, mean, rstd)
        y = th.addcmul(offset, wide, gain)
        if silu:
            F.silu(y, inplace=True)
        ctx.save_for_backward(x, a, b, mean, rstd)
        ctx.silu = silu
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mean, rstd = ctx.saved_tensors
        groups = mean.shape[1]
        wide = x.to(a.dtype)
        grad = grad.contiguous(memory_format=th.channels_last).to(a.dtype)
        gain, offset = _affine(a, b, mean, rstd)
        if ctx.silu:
            grad = th.ops.aten.silu_backward(grad, th.addcmul(offset, wide, gain))
        rows, grad_rows = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (wide, grad))
        total = grad_rows.sum(1)                                    # [N,C], sum of dy
        with_x = (grad_rows * rows).sum(1)                          # [N,C], sum of dy x
        mean_c, rstd_c = (_of_channels(t, a.shape[1]) for t in (mean, rstd))
        grad_a = (with_x - mean_c * total) * rstd_c
        if not ctx.needs_input_grad[0]:
            return None, grad_a, total, None, None, None
        # dx = rstd (a dy - <a dy> - x_hat <a dy x_hat>), where <> is the mean over a group
        count = rows.shape[1] * (rows.shape[2] // groups)
        along = _of_groups(a * grad_a, groups) / count              # [N,G]
        level = _of_groups(a * total, groups) / count
        slope = -along * rstd.square()
        constant = -rstd * level - slope * mean
        dx = th.addcmul(*(_as_image(_of_channels(t, a.shape[1])) for t in (constant, slope)), wide)
        return dx.addcmul_(grad, gain).to(x.dtype), grad_a, total, None, None, None


def _affine(a: Tensor, b: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """a x_hat + b = gain x + offset, both [N,C,1,1]."""
    mean_c, gain = _of_channels(mean, a.shape[1]), a * _of_channels(rstd, a.shape[1])
    return _as_image(gain), _as_image(th.addcmul(b, gain, mean_c, value=-1))


def _of_groups(per_channel: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group: [N,C] -> [N,G]."""
    return per_channel.unflatten(1, (groups, -1)).sum(2)


def _of_channels(per_group: Tensor, channels: int) -> Tensor:
    """[N,G] -> [N,C]."""
    return per_group.repeat_interleave(channels // per_group.shape[1], 1)


def _as_image(per_channel: Tensor) -> Tensor:
    return per_channel[:, :, None, None]
