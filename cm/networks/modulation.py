"""How the embedding of time and class modulates a residual block: a gain and a shift for each channel.

In training each block projects the embedding itself. While a network samples, one product does it for all of them.

Shapes: N batch, C channels of a block, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn


class Modulation(NamedTuple):
    """What multiplies and what is added to the channels of a block; without a gain the shift comes before the norm."""

    gain: Tensor | None                                             # [N,C], 1 + scale
    shift: Tensor                                                   # [N,C]


class Modulated(Protocol):
    """A block that projects the embedding by a linear layer, of C rows or, where it has a gain, C of each."""

    @property
    def projection(self) -> nn.Module:
        """All that the embedding passes through; its last layer is the linear one."""
        ...

    @property
    def has_gain(self) -> bool:
        """Whether the first half of the rows is a scale."""
        ...


Conditioning = Tensor | Mapping[Modulated, Modulation]
"""What a block is given: the embedding [N,D], or all that one product has made of it."""


def modulation(block: Modulated, emb: Conditioning, dtype: th.dtype) -> Modulation:
    """The modulation of a block, from the embedding or made before.

    :param dtype: of the data of the block.
    """
    if not isinstance(emb, Tensor):
        return emb[block]
    rows = block.projection(emb)                                    # [N,C], or [N,2C]: scale, then shift
    if not block.has_gain:
        return Modulation(None, rows)
    scale, shift = _as_applied(rows, dtype).chunk(2, dim=1)
    return Modulation(1 + scale, shift)


class JointModulation:
    """The projections of all blocks as one product: the same numbers up to rounding, in a few operations.

    It holds a copy of the weights as they are now, so it is of use while they do not change.

    :param blocks: their projections pass `can_join`.
    :param act: applied to the embedding before the product.
    """

    def __init__(self, blocks: Sequence[Modulated], act: Callable[[Tensor], Tensor]) -> None:
        self.blocks, self.act = blocks, act
        layers = [_linear_of(block) for block in blocks]
        self.widths = [layer.out_features // (1 + block.has_gain) for block, layer in zip(blocks, layers)]   # C of each
        self.gains = [width for block, width in zip(blocks, self.widths) if block.has_gain]
        self.weight = self._sorted([layer.weight for layer in layers])
        self.bias = self._sorted([layer.bias for layer in layers])

    def _sorted(self, params: Sequence[Tensor]) -> Tensor:
        """The rows of all scales, then those of all shifts."""
        scales = [p[:c] for p, c, block in zip(params, self.widths, self.blocks) if block.has_gain]
        return th.cat([*scales, *(p[-c:] for p, c in zip(params, self.widths))])

    def __call__(self, emb: Tensor) -> Mapping[Modulated, Modulation]:
        """[N,D] -> the modulation of each block."""
        rows = F.linear(self.act(emb), self.weight, self.bias)      # [N, all rows]
        scale, shift = rows.split([sum(self.gains), sum(self.widths)], dim=1)
        gains = iter((1 + _as_applied(scale, scale.dtype)).split(self.gains, dim=1))
        shifts = shift.split(self.widths, dim=1)
        return {block: Modulation(next(gains) if block.has_gain else None, each)
                for block, each in zip(self.blocks, shifts)}


def can_join(block: Modulated) -> bool:
    """Whether the projection is plain: it ends with no other kind of layer, and nothing watches its calls."""
    watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in block.projection.modules())
    return not watched and type(_linear_of(block)) is nn.Linear


def _linear_of(block: Modulated) -> nn.Linear:
    *_, last = block.projection.modules()
    return cast(nn.Linear, last)


def _as_applied(rows: Tensor, dtype: th.dtype) -> Tensor:
    """In the precision in which gains are applied: that of the data, but on CPUs float32 at least, see `norm_act`."""
    return rows.to(th.promote_types(rows.dtype, th.float32) if rows.device.type == "cpu" else dtype)
