"""Softmax attention of bfloat16 data on CPUs: matrix products of a few heads at a time.

torch's fused kernel for CPUs does not reach the speed of their bfloat16 matrix units; batched products do, as long as
the attention weights fit in the cache. As with the fused kernels, the backward pass recomputes the weights, so no [T,T]
is kept. The weights are bfloat16, like those of two einsums under autocast.

Shapes: N batch, C channels, T positions, h heads, d head width (C = h d).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch as th
from torch import Tensor
from torch.autograd.function import once_differentiable

from cm.networks.jvp import inside_transform

BLOCK = 2**19                                               # attention weights at a time: 1 MiB
LONGEST = 1024                                              # positions up to which the weights of one head fit


def suits(tokens: Tensor) -> bool:
    """Whether `attention` applies to [N,T,3C]; compilers and transforms use torch's own operations."""
    return (
        tokens.device.type == "cpu" and tokens.dtype == th.bfloat16 and tokens.shape[1] <= LONGEST
        and not th.compiler.is_compiling() and not inside_transform()
    )


def attention(tokens: Tensor, num_heads: int) -> Tensor:
    """[N,T,3C], all queries, then all keys, then all values, each as h heads of d channels -> [N,T,C]."""
    return _Attention.apply(tokens, num_heads)


class _Attention(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_heads = num_heads
        q, k, v = _heads(tokens, 3 * num_heads).chunk(3)
        out = th.empty_like(v)
        for part in _blocks(v):
            th.bmm(_weights(q[part], k[part]), v[part], out=out[part])
        return _tokens(out, len(tokens))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        q, k, v = _heads(tokens, 3 * ctx.num_heads).chunk(3)
        grad = _heads(grad, ctx.num_heads)
        grads = grad.new_empty(3 * len(v), *v.shape[1:])
        grad_q, grad_k, grad_v = grads.chunk(3)
        for part in _blocks(v):
            weights = _weights(q[part], k[part])
            th.bmm(weights.mT, grad[part], out=grad_v[part])
            grad_logits = th.ops.aten._softmax_backward_data(grad[part] @ v[part].mT, weights, -1, weights.dtype)
            th.bmm(grad_logits, k[part], out=grad_q[part])
            th.bmm(grad_logits.mT, q[part], out=grad_k[part])
        grads[: 2 * len(v)] *= _scale(v)
        return _tokens(grads, len(tokens)), None


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)): [B,T,d] each -> [B,T,T]."""
    return th.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=_scale(q)).softmax(-1)


def _scale(heads: Tensor) -> float:
    return heads.shape[-1] ** -0.5


def _heads(tokens: Tensor, count: int) -> Tensor:
    """[N,T,count d] -> [count N,T,d], all images' first head first."""
    n, length, _ = tokens.shape
    return tokens.view(n, length, count, -1).permute(2, 0, 1, 3).flatten(0, 1)


def _tokens(heads: Tensor, n: int) -> Tensor:
    """The inverse of `_heads`: [count N,T,d] -> [N,T,count d]."""
    return heads.unflatten(0, (-1, n)).permute(1, 2, 0, 3).flatten(2)


def _blocks(heads: Tensor) -> Iterator[slice]:
    """Slices of [B,T,d] whose weights [T,T] have about `BLOCK` elements together."""
    step = max(1, BLOCK // heads.shape[1] ** 2)
    return (slice(start, start + step) for start in range(0, len(heads), step))
