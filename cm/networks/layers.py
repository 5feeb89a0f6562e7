"""Building blocks shared by every network: layers, embeddings, gradient checkpointing.

Shapes: N batch, C channels, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch as th
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from cm.errors import UserError
from cm.networks.jvp import depth, inside_jvp
from cm.tensors import without_tf32

Module = TypeVar("Module", bound=nn.Module)

GROUPS = 32     # the published checkpoints were trained with 32 groups everywhere


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, endpoint: bool = False) -> Tensor:
    """Cosines, then sines, of the timesteps at `dim // 2` geometrically spaced frequencies: [N] -> [N,D].

    Ho et al. 2020 (arXiv 2006.11239), after Vaswani et al. 2017, section 3.5. The frequencies are
    max_period^(-i/half), i = 0..half-1; an odd `dim` gets a last column of zeros.

    :param endpoint: divide by half-1 instead, so that the last frequency is 1 / max_period.
    :param timesteps: [N], may be fractional or negative. float64 stays float64, everything else is computed in
        float32: the published models are called at times near -1500, where half precision resolves only integers.
    :raises ValueError: if `timesteps` has more than one axis.
    """
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps must be one number per sample, [N], but have shape {tuple(timesteps.shape)}")
    dtype = th.float64 if timesteps.dtype == th.float64 else th.float32
    half = dim // 2
    powers = th.arange(half, dtype=dtype, device=timesteps.device) / (half - 1 if endpoint else half)
    angles = timesteps.to(dtype)[:, None] * th.exp(-math.log(max_period) * powers)       # [N, D/2]
    embedding = th.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), written out inside two forward-mode passes, where torch's function has no second derivative."""
    return F.silu(x) if depth() < 2 else x * x.sigmoid()


class SiLU(nn.SiLU):
    """`silu` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with float32 statistics and weights for half-precision inputs; keeps the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,...] -> same."""
        # The CPU kernel accepts half inputs with float32 weights and computes in float32. The kernels of other devices
        # do not, nor does the forward-mode rule, which also needs x [N,C,...] to be contiguous.
        differentiated = inside_jvp()
        if differentiated:
            x = x.contiguous()
        if x.dtype not in (th.float16, th.bfloat16) or (x.device.type == "cpu" and not differentiated):
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """The networks' normalisation layer: 32 groups, eps 1e-5.

    :raises UserError: if `channels` is not a multiple of 32.
    """
    if channels <= 0 or channels % GROUPS:
        near = max(GROUPS, round(channels / GROUPS) * GROUPS)
        raise UserError(f"a layer of {channels} channels cannot be normalised in {GROUPS} groups: make its width "
                        f"(num_channels times its channel_mult) a multiple of {GROUPS}, such as {near}")
    return GroupNorm32(GROUPS, channels)


def zero_module(module: Module) -> Module:
    """Set every parameter of `module` to zero, and return it."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def _by_dims(layers: Sequence[type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in (1, 2, 3):
        raise ValueError(f"unsupported dims {dims!r}; choose 1, 2 or 3")
    return layers[dims - 1]


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional convolution; the other arguments are torch's.

    :raises ValueError: for other dims.
    """
    return _by_dims((nn.Conv1d, nn.Conv2d, nn.Conv3d), dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """1-, 2- or 3-dimensional average pooling; the other arguments are torch's.

    :raises ValueError: for other dims.
    """
    return _by_dims((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), dims)(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A fully connected layer."""
    return nn.Linear(*args, **kwargs)


class Dropout(nn.Dropout):
    """Dropout whose mask depends on the random state and on the shape of x, whatever its memory format and dtype.

    So passes that share a random state share their masks: with gradients and without, which differ in memory formats on
    GPUs, or a derivative in float32 and a pass in bf16. torch's kernels for GPUs draw in the order of memory, and more
    numbers at once where they are narrow.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return dropout(x, self.p, self.training)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`Dropout` as a function."""
    if not training or not 0 < p < 1 or not _draws_in_order_of_memory(x.device):
        return F.dropout(x, p, training)
    kept, scale = _mask(x, p), 1 / (1 - p)
    x = x.contiguous(memory_format=th.channels_last if x.ndim == 4 else th.contiguous_format)
    if inside_jvp():
        return (x * kept).mul_(scale)
    return th.ops.aten.native_dropout_backward(x, kept, scale)      # x kept scale, in one operation


def _mask(x: Tensor, p: float) -> Tensor:
    """What to keep of x, drawn in one dtype, and for images channels-last, as the convolution that comes next wants x.

    torch's dropout draws it, as generated code does not change that, with data that nobody reads.
    """
    first, *others = x.shape
    shape = (first, *others[1:], others[0]) if x.ndim == 4 else x.shape
    kept = th.native_dropout(th.empty(shape, dtype=th.bfloat16, device=x.device), p, True)[1]
    return kept.permute(0, 3, 1, 2) if x.ndim == 4 else kept


def _draws_in_order_of_memory(device: th.device) -> bool:
    return device.type != "cpu"


def without_autocast(device: th.device) -> AbstractContextManager:
    """A context in which layers compute in the precision of their inputs, even inside an autocast region."""
    if th.amp.is_autocast_available(device.type):
        return th.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def full_float32(device: th.device | str) -> Iterator[None]:
    """A context in which float32 data is computed in float32: no autocast, and no TensorFloat-32 on GPUs."""
    with without_tf32(), without_autocast(th.device(device)):
        yield


def checkpoint(func: Callable, inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """Evaluate `func(*inputs)`; with `flag`, do not keep its activations but recompute them in the backward pass.

    The second computation repeats the random numbers of the first, so dropout uses the same mask.

    :param params: has no effect; guided-diffusion's callers pass it, and autograd finds the parameters by itself.
    """
    if flag and th.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False, preserve_rng_state=True)
    return func(*inputs)
