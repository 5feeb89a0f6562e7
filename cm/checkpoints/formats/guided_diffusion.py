"""Weights of guided-diffusion, whose attention is stored differently from the published consistency models.

Shapes: C channels of an attention layer, h heads, d head width (C = h d).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cm.errors import UserError
from cm.networks.attention import count_heads


def to_published_layout(
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    num_heads_upsample: int,
    num_head_channels: int,
    use_new_attention_order: bool,
) -> dict[str, Tensor]:
    """The same weights in the layout of `cm.networks.attention`; weights that already have it are unchanged.

    guided-diffusion's attention is a convolution in one dimension, [3C,C,1] where the published files have
    [3C,C,1,1]. Its 3C rows go head by head, q k v in each, unless its `use_new_attention_order` made them q k v with
    all heads in each, as published; names and shapes are the same in both.

    :raises UserError: if the heads do not divide the channels of a layer, or its weights are of other shapes.
    """
    converted = dict(weights)
    for name, weight in weights.items():
        if weight.ndim != 3 or not name.endswith((".qkv.weight", ".proj_out.weight")):
            continue
        converted[name] = weight.unsqueeze(-1)
        if name.endswith(".qkv.weight") and not use_new_attention_order:
            in_decoder = name.startswith("output_blocks.") and num_heads_upsample != -1
            heads = count_heads(weight.shape[1], num_heads_upsample if in_decoder else num_heads, num_head_channels)
            bias = name.removesuffix("weight") + "bias"
            if len(weight) != 3 * weight.shape[1] or bias not in weights or weights[bias].shape != weight.shape[:1]:
                raise UserError(f"{name} {list(weight.shape)} and {bias} do not belong to an attention layer of "
                                "guided-diffusion")
            converted[name] = _heads_last(converted[name], heads)
            converted[bias] = _heads_last(weights[bias], heads)
    return converted


def _heads_last(rows: Tensor, heads: int) -> Tensor:
    """Rows [h,3,d] flat, one head after the other -> [3,h,d] flat: all of q, then k, then v."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
