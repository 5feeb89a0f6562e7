"""How the embedding of time and class modulates a residual block: a gain and a shift for each channel.

In training each block projects the embedding itself. While a network samples, one product does it for all that are
alike.

Shapes: N batch, C channels of a block, D embedding width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch as th
from torch import Tensor, nn

from cm.networks.layers import without_autocast


class Modulation(NamedTuple):
    """What multiplies and what is added to the channels of a block; without a gain the shift comes before the norm."""

    gain: Tensor | None                                             # [N,C], 1 + scale
    shift: Tensor                                                   # [N,C]
    is_whole: bool = False                                          # the weights of the norm are in them


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

    @property
    def modulated_norm(self) -> nn.GroupNorm:
        """The norm whose result has the gain and the shift."""
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
    """The projections of all blocks of a width as one product: the same numbers up to rounding, in few operations.

    The weights of the norms are in them, so that a norm applies the modulation as its own weights. It holds a copy of
    the weights as they are now, so it is of use while they do not change.

    :param blocks: their projections pass `can_join`.
    :param act: applied to the embedding before the product.
    """

    def __init__(self, blocks: Sequence[Modulated], act: Callable[[Tensor], Tensor]) -> None:
        self.act = act
        alike = defaultdict(list)
        for block in blocks:
            alike[block.has_gain, block.modulated_norm.num_channels].append(block)
        self.products = [_Product(each) for each in alike.values()]

    def __call__(self, emb: Tensor) -> Mapping[Modulated, Modulation]:
        """[N,D] -> the modulation of each block."""
        with without_autocast(emb.device):
            emb = self.act(emb)
            return {block: each for product in self.products for block, each in product(emb)}


class _Product:
    """The projections of blocks that are alike; K matrices, one for each gain and each shift.

    A gain is w (1 + scale), and its shift b (1 + scale) + shift, where w and b are the weights of the norm.
    """

    def __init__(self, blocks: Sequence[Modulated]) -> None:
        self.blocks, self.has_gain = blocks, blocks[0].has_gain
        layers, norms = [_linear_of(block) for block in blocks], [block.modulated_norm for block in blocks]
        weights, biases = th.stack([layer.weight for layer in layers]), th.stack([layer.bias for layer in layers])
        rows = th.cat([weights, biases[..., None]], dim=2)          # [K,C,D+1], or [K/2,2C,D+1]: scale, then shift
        rows = rows.to(th.promote_types(rows.dtype, th.float32))
        if self.has_gain:
            w, b = (th.stack(each)[..., None] for each in zip(*((norm.weight, norm.bias) for norm in norms)))
            scale, shift = rows.chunk(2, dim=1)
            scale[..., -1] += 1
            rows = th.stack([w * scale, b * scale + shift], dim=1).flatten(0, 1)
        self.weight, self.bias = rows[..., :-1].mT.contiguous(), rows[:, None, :, -1]       # [K,D,C], [K,1,C]

    def __call__(self, emb: Tensor) -> Iterator[tuple[Modulated, Modulation]]:
        emb = emb.to(self.weight.dtype).expand(len(self.weight), -1, -1)                        # [K,N,D]
        rows = iter(th.baddbmm(self.bias, emb, self.weight))                                    # [N,C] each
        for block in self.blocks:
            yield block, Modulation(next(rows) if self.has_gain else None, next(rows), is_whole=self.has_gain)


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
