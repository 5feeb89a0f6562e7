"""Forward-mode differentiation: the value of a function and its derivative along one direction, in one pass.

The networks of this package can be differentiated in this way, in inference mode and under autocast too. Layers for
which torch has no forward-mode rule call `inside_jvp`, or `depth` for the second derivative, and then take a slower
path. A compiled network never runs inside a derivative, see `cm.networks.compile`, so the compiler does not trace these
calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch as th
from torch import Tensor
from torch.autograd import forward_ad

JVP_COST = 3                                                        # evaluations that one pass counts as

_depth: ContextVar[int] = ContextVar("depth", default=0)


def depth() -> int:
    """The number of calls of `jvp` around this code: 2 in a derivative of a derivative."""
    return 0 if th.compiler.is_compiling() else _depth.get()


def inside_jvp() -> bool:
    """Whether this code is being differentiated in forward mode, by `jvp` or by torch.func itself."""
    # torch has no public function for this: unpack_dual, the closest, fails under vmap and sees no tangent when a
    # gradient is differentiated.
    return not th.compiler.is_compiling() and forward_ad._current_level >= 0


def inside_transform() -> bool:
    """Whether torch.func transforms this code in any way: custom autograd functions do not work then."""
    functorch = th._C._functorch  # pyright: ignore[reportAttributeAccessIssue]  # private, without type stubs
    return inside_jvp() or functorch.peek_interpreter_stack() is not None


def evaluations_of_a_call() -> int:
    """The cost of a call of the network here, in plain evaluations: 1, times JVP_COST for every `jvp` around it.

    Value and derivative together are twice the arithmetic, and they cannot use the fused kernels.
    """
    return JVP_COST ** depth()


def jvp(f: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """f at the primals, and its derivative along the tangents: the Jacobian-vector product, without the Jacobian.

    :param tangents: one for each primal, of its shape and dtype.
    """
    with _deeper():
        value, derivative = th.func.jvp(f, tuple(primals), tuple(tangents))[:2]
        return value, derivative


def second_derivative(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """d^2 f(x + h v) / dh^2 at h = 0, of the shape of f(x): a pass inside a pass."""
    return jvp(lambda z: jvp(f, (z,), (v,))[1], (x,), (v,))[1]


@contextmanager
def _deeper() -> Iterator[None]:
    before = _depth.set(_depth.get() + 1)
    try:
        yield
    finally:
        _depth.reset(before)
