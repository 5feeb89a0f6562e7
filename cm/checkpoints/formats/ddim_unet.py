"""Files of the U-Net of ermongroup/ddim, which SA-DPM's authors also train (arXiv 2010.02502, 2312.12431): refused by
name.

It is none of the networks here. It halves the side by a convolution padded on the right and the bottom alone, where
guided-diffusion's pads all sides; it embeds time by sines and then cosines, whose slowest frequency is 1/10000; and the
epsilon of its group norms is 1e-6. So none of the networks here can hold its weights, whatever their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cm.errors import UserError

NAMES = ("temb.dense.0.weight", "conv_in.weight", "down.0.block.0.temb_proj.weight", "mid.attn_1.q.weight")
WRAPPER = "module."                                         # of torch's DataParallel, in the published files


def refuse(content: Any, source: str) -> None:
    """:raises UserError: if a file holds these weights, alone or in a list with the state of their training."""
    parts = content if isinstance(content, (list, tuple)) else [content]
    if any(isinstance(part, Mapping) and _has_names(part) for part in parts):
        raise UserError(
            f"{source} holds the U-Net of the published code of DDIM and SA-DPM (such as model_N_ema.pth), which is "
            "not a network of this toolkit and cannot be converted exactly: sample it with the code it came from and "
            "evaluate its images here (evaluations/evaluator.py), or train a new model with --objective sadpm"
        )


def _has_names(part: Mapping[Any, Any]) -> bool:
    return all(name in part or WRAPPER + name in part for name in NAMES)
