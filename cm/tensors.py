"""Small functions on tensors that every package uses: broadcasting, means over samples, moving averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch as th
from torch import Tensor


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """Add axes of length 1 at the end of `x` until it has `target_dims` of them, so that [N] multiplies [N,C,H,W].

    :raises ValueError: if `x` already has more axes than that.
    """
    missing = target_dims - x.ndim
    if missing < 0:
        raise ValueError(f"cannot append axes: the input has {x.ndim} of them, target_dims is {target_dims}")
    return x[(...,) + (None,) * missing]


def clip_to_pixels(x: Tensor) -> Tensor:
    """Clamp to [-1, 1]; infinite values become NaN, so that an overflow does not look like a white or black pixel."""
    nan = float("nan")
    return x.nan_to_num(nan, nan, nan).clamp(-1, 1)


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all axes but the first: [N,...] -> [N]."""
    return tensor.mean(dim=tuple(range(1, tensor.ndim))) if tensor.ndim > 1 else tensor


def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """target <- rate target + (1 - rate) source, in place, for all parameters at once.

    Rates 1 and 0 are exact: they leave the target as it is, and copy the source. Keep targets in float32: at rates
    near 1 a half-precision target rounds most updates away.

    :raises ValueError: if `rate` is outside [0, 1], or the two lists differ in length.
    """
    update_emas([list(target_params)], list(source_params), [rate])


@th.no_grad()
def update_emas(targets: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], rates: Sequence[float]) -> None:
    """`update_ema` for several averages of the same parameters, each with its own rate, in one pass.

    :raises ValueError: for the reasons of `update_ema`, and if there are more or fewer rates than averages.
    """
    every, weights = [], []
    for target, rate in zip(targets, rates, strict=True):
        if not 0 <= rate <= 1:
            raise ValueError(f"the EMA rate must lie in [0, 1], got {rate}")
        if len(target) != len(sources):
            raise ValueError(f"cannot average {len(sources)} parameters into {len(target)}: "
                             "both lists must come from networks of one architecture")
        every += target
        weights += [1 - rate] * len(target)
    if every:
        values = [source.to(t.dtype) for target in targets for t, source in zip(target, sources)]
        # torch documents no fused in-place lerp of lists of tensors; the type stubs do not export this one
        th._foreach_lerp_(every, values, weights)  # pyright: ignore[reportPrivateImportUsage]


def allow_tf32(allowed: bool) -> None:
    """Let GPUs multiply float32 numbers in TensorFloat-32, which has the 10 bits of half precision, or not.

    torch's own default is to do so in convolutions, and not in matrix products.
    """
    th.backends.cudnn.allow_tf32 = allowed
    th.backends.cuda.matmul.allow_tf32 = allowed


@contextmanager
def without_tf32() -> Iterator[None]:
    """A context in which GPUs multiply float32 numbers in float32, whatever the run has chosen."""
    convolutions, products = th.backends.cudnn.allow_tf32, th.backends.cuda.matmul.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        th.backends.cudnn.allow_tf32, th.backends.cuda.matmul.allow_tf32 = convolutions, products


# Operations of torch on lists of tensors, with one kernel launch for all; its type stubs do not export these names.


def copy_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """target <- source, in place, for every pair of two lists of tensors."""
    th._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


def scale_tensors(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply every tensor of a list by a number, or by a scalar tensor, in place."""
    th._foreach_mul_(list(tensors), factor)  # pyright: ignore[reportPrivateImportUsage]


def norm_of_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all elements of all tensors: a scalar tensor."""
    return th.linalg.vector_norm(th.stack(th._foreach_norm(list(tensors))))  # pyright: ignore[reportPrivateImportUsage]
