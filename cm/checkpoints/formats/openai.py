"""The model flags of a guided-diffusion state dict without a manifest.

They are inferred from its names and shapes; for the published files the others are known.

The published files are those of https://openaipublic.blob.core.windows.net/consistency/: edm_imagenet64_ema.pt,
cd_imagenet64_l2.pt, cd_imagenet64_lpips.pt, ct_imagenet64.pt, and the same four for bedroom256 and cat256.

Level l of L works at image_size / 2^l; a level has R residual blocks in the encoder and R + 1 in the decoder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cm.checkpoints.formats import ddim_unet
from cm.errors import UserError
from cm.io import untrusted

# Image side and head width are not visible in the weights; each published family has its own.
PUBLISHED = (
    ({"num_channels": 192, "channel_mult": "1,2,3,4", "num_res_blocks": 3, "num_classes": 1000},
     {"image_size": 64, "num_head_channels": 64}),
    ({"num_channels": 256, "channel_mult": "1,1,2,2,4,4", "num_res_blocks": 2, "num_classes": 0},
     {"image_size": 256, "num_head_channels": 64}),
)

PUBLISHED_NAME = re.compile(r"(edm|cd|ct)_(?:imagenet64|bedroom256|cat256)(?:_ema|_l2|_lpips)?\.pt")
PUBLISHED_MODES = {"edm": "edm", "cd": "consistency_distillation", "ct": "consistency_training"}

FOREIGN = {
    "down_blocks.": "these are names of the diffusers library",
    "param_groups": "this is the state of an optimizer; use the model or ema file in the same folder",
    "state_dict": "the weights are wrapped; save its 'state_dict' alone",
    "model.model": "these are names of k-diffusion",
}


def published_mode(path: str) -> dict[str, str]:
    """What a published file was trained as, by its name, as a flag; no flag for any other name."""
    match = PUBLISHED_NAME.fullmatch(os.path.basename(path))
    return {"training_mode": PUBLISHED_MODES[match[1]]} if match else {}


def architecture(weights: Mapping[str, Tensor], source: str, null_class: bool = False) -> dict[str, Any]:
    """The model flags that names and shapes of a state dict determine, and `attention_levels`.

    :param null_class: whether the last class is the label for no class, which the weights do not show.
    :raises UserError: if these are not the weights of a guided-diffusion U-Net.
    """
    def shape(name: str) -> tuple[int, ...]:
        if not is_plain or name not in weights or weights[name].ndim == 0 or 0 in weights[name].shape:
            raise UserError(f"{source} is not a U-Net of this toolkit or guided-diffusion: it has no {name!r}; "
                            f"{_describe(weights)}")
        return tuple(weights[name].shape)

    ddim_unet.refuse(weights, source)
    is_plain = isinstance(weights, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    )
    channels = shape("time_embed.0.weight")[-1]
    blocks = _count(weights, "input_blocks")
    ups = [name for name in weights if re.fullmatch(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight", name)]
    levels = len(ups) + 1
    if blocks % levels:
        raise UserError(f"{source}: {blocks} encoder blocks cannot be divided into {levels} levels")
    per_level = blocks // levels                            # R residual blocks, and one that halves the side
    first_blocks = [1 + level * per_level for level in range(levels)]
    widths = [shape(f"input_blocks.{block}.0.out_layers.3.weight")[0] for block in first_blocks]
    emb_rows = shape("input_blocks.1.0.emb_layers.1.weight")[0]
    classes = shape("label_emb.weight")[0] - null_class if "label_emb.weight" in weights else 0
    return {
        "channels": (*shape("input_blocks.0.0.weight")[1:2], 3)[0],        # odd shapes are reported when they are used
        "num_channels": channels,
        "channel_mult": ",".join(f"{width / channels:g}" for width in widths),
        "num_res_blocks": per_level - 1,
        "attention_levels": tuple(
            level for level, block in enumerate(first_blocks) if f"input_blocks.{block}.1.qkv.weight" in weights
        ),
        "use_scale_shift_norm": emb_rows == 2 * widths[0],
        "class_cond": classes > 0,
        "num_classes": classes,
    } | ({"resblock_updown": ups[0].endswith("in_layers.2.weight")} if ups else {})


def model_flags(
    weights: Mapping[str, Tensor], source: str, image_size: int | None = None, null_class: bool = False
) -> dict[str, Any]:
    """All model flags of a state dict: those that its shapes show and, for the published files, the others.

    :param image_size: the side of the images where it is known from elsewhere.
    :param null_class: see `architecture`.
    :return: flags; image_size, attention_resolutions and num_head_channels only where they are known.
    """
    flags = architecture(weights, source, null_class)
    levels = flags.pop("attention_levels")
    for visible, others in PUBLISHED:
        if all(flags[name] == value for name, value in visible.items()):
            flags.update(others)
    side = flags.get("image_size", image_size)
    if side is not None:
        flags["attention_resolutions"] = ",".join(str(side // 2**level) for level in levels)
    return flags


def _describe(content: Any) -> str:
    """What a file holds instead of weights, for an error message."""
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}, not a dict of tensors"
    names = [untrusted.shown(name) if not isinstance(name, str) else name[:100] for name in content]
    hints = [hint for start, hint in FOREIGN.items() if any(name.startswith(start) for name in names)]
    return "; ".join([f"its first entries are {', '.join(names[:3]) or 'none'}", *hints[:1]])


def _count(weights: Mapping[str, Tensor], stem: str) -> int:
    """How many blocks are called `stem`.0, `stem`.1, ..."""
    return len({name.split(".")[1] for name in weights if name.startswith(f"{stem}.")})
