"""Folders of the diffusers library's ConsistencyModelPipeline, to and from the U-Net of guided-diffusion.

The two have the same function; names, and the attention's three matrices in one, differ. Such a folder can hold
consistency models alone: the pipeline always applies their scalings.

Level l of L works at image_size / 2^l, with R residual blocks on the way down and R + 1 on the way up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch as th
from torch import Tensor

from cm.checkpoints.formats import safetensor_files
from cm.checkpoints.serialization import size_of
from cm.data.class_names import ClassNames, checked
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage
from cm.io.budget import SETTINGS, read_json
from cm.io.untrusted import shown
from cm.networks.extent import demand_held

PIPELINE, UNET, SCHEDULER = "ConsistencyModelPipeline", "UNet2DModel", "CMStochasticIterativeScheduler"
VERSION = "0.18.0.dev0"                                             # the first with this pipeline
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
           "diffusion_pytorch_model.bin")
BLOCK = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
         "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
ENDS = (
    ("layer", "time_embed.0", "time_embedding.linear_1"), ("layer", "time_embed.2", "time_embedding.linear_2"),
    ("layer", "label_emb", "class_embedding"), ("layer", "input_blocks.0.0", "conv_in"),
    ("block", "middle_block.0", "mid_block.resnets.0"), ("attention", "middle_block.1", "mid_block.attentions.0"),
    ("block", "middle_block.2", "mid_block.resnets.1"), ("layer", "out.0", "conv_norm_out"),
    ("layer", "out.2", "conv_out"),
)
WITH_ATTENTION = {"down": "AttnDownBlock2D", "up": "AttnUpBlock2D"}
PLAIN = {("down", True): "ResnetDownsampleBlock2D", ("down", False): "DownBlock2D",
         ("up", True): "ResnetUpsampleBlock2D", ("up", False): "UpBlock2D"}


# --- names -----------------------------------------------------------------------------------------------------------


def _layer_names(levels: int, blocks: int, attention: tuple[int, ...], resblock_updown: bool) -> Iterator[tuple]:
    """(kind, our name, their name) of every layer, where kind is layer, block or attention.

    :param blocks: R.
    :param attention: the levels that have attention.
    """
    yield from ENDS
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        first_down, first_up = 1 + level * (blocks + 1), (levels - 1 - level) * (blocks + 1)
        for i in range(blocks):
            yield "block", f"input_blocks.{first_down + i}.0", f"{down}.resnets.{i}"
            if level in attention:
                yield "attention", f"input_blocks.{first_down + i}.1", f"{down}.attentions.{i}"
        for i in range(blocks + 1):
            yield "block", f"output_blocks.{first_up + i}.0", f"{up}.resnets.{i}"
            if level in attention:
                yield "attention", f"output_blocks.{first_up + i}.1", f"{up}.attentions.{i}"
        lower = f"input_blocks.{first_down + blocks}.0"
        higher = f"output_blocks.{first_up + blocks}.{2 if level in attention else 1}"
        if level < levels - 1:
            yield _resampling(resblock_updown, lower, "op", f"{down}.downsamplers.0")
        if level:
            yield _resampling(resblock_updown, higher, "conv", f"{up}.upsamplers.0")


def _resampling(is_block: bool, ours: str, conv: str, theirs: str) -> tuple[str, str, str]:
    """The layer between two levels: a residual block, or a convolution of the name `conv`."""
    return ("block", ours, theirs) if is_block else ("layer", f"{ours}.{conv}", f"{theirs}.conv")


def _tensor_names(layers: Iterator[tuple]) -> dict[str, tuple[str, int | None]]:
    """Their name -> (our name, which third of its rows: q, k or v; None for all)."""
    found: dict[str, tuple[str, int | None]] = {}
    for kind, ours, theirs in layers:
        for part in ("weight", "bias"):
            if kind == "layer":
                found[f"{theirs}.{part}"] = (f"{ours}.{part}", None)
            elif kind == "block":
                found |= {f"{theirs}.{b}.{part}": (f"{ours}.{a}.{part}", None) for a, b in BLOCK.items()}
            else:
                found[f"{theirs}.group_norm.{part}"] = (f"{ours}.norm.{part}", None)
                found |= {f"{theirs}.to_{x}.{part}": (f"{ours}.qkv.{part}", i) for i, x in enumerate("qkv")}
                found[f"{theirs}.to_out.0.{part}"] = (f"{ours}.proj_out.{part}", None)
    return found


def _names_for(flags: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """`_tensor_names` of the network that flags describe."""
    widths = flags["channel_mult"].split(",")
    attention = _attention_levels(flags)
    return _tensor_names(_layer_names(len(widths), flags["num_res_blocks"], attention, flags["resblock_updown"]))


def _attention_levels(flags: Mapping[str, Any]) -> tuple[int, ...]:
    """The levels that have attention."""
    sides = [int(side) for side in flags["attention_resolutions"].split(",") if side.strip()]
    levels = len(flags["channel_mult"].split(","))
    return tuple(level for level in range(levels) if flags["image_size"] >> level in sides)


def _level_widths(flags: Mapping[str, Any]) -> list[int]:
    """Channels of each level."""
    return [int(float(mult) * flags["num_channels"]) for mult in flags["channel_mult"].split(",")]


# --- writing ---------------------------------------------------------------------------------------------------------


def write(
    folder: str, weights: Mapping[str, Tensor], flags: Mapping[str, Any], num_train_timesteps: int,
    class_names: ClassNames = (),
) -> None:
    """Write a consistency model as a folder that `ConsistencyModelPipeline.from_pretrained` loads.

    A label of no class is left out: the pipeline draws from all labels that it finds.

    :param flags: those of the network and the diffusion, and its training_mode.
    :param num_train_timesteps: noise levels of the grid that it was trained on, which `timesteps` index.
    :param class_names: of the classes; they are written as `id2label`, as in the library's DiTPipeline.
    :raises UserError: for a model that diffusers cannot have, or a folder that cannot be written.
    """
    config = _unet_config(flags)
    scheduler = {
        "_class_name": SCHEDULER, "_diffusers_version": VERSION, "num_train_timesteps": num_train_timesteps,
        "sigma_min": flags["sigma_min"], "sigma_max": flags["sigma_max"],
    }
    index = {
        "_class_name": PIPELINE, "_diffusers_version": VERSION, "scheduler": ["diffusers", SCHEDULER],
        "unet": ["diffusers", UNET],
    } | ({"id2label": {str(number): name for number, name in enumerate(class_names)}} if class_names else {})
    theirs = {}
    for name, (ours, third) in _names_for(flags).items():
        if ours in weights:
            rows = weights[ours] if third is None else weights[ours].chunk(3)[third]
            if ours == "label_emb.weight" and flags.get("null_class"):
                rows = rows[:-1].clone()
            is_matrix = ".to_" in name and name.endswith("weight")  # their 1x1 convolutions of attention
            theirs[name] = rows.flatten(1) if is_matrix else rows
    for sub in ("unet", "scheduler"):
        storage.make_folder(os.path.join(folder, sub))
    safetensor_files.write(os.path.join(folder, "unet", WEIGHTS[0]), theirs)
    storage.write_json(os.path.join(folder, "unet", "config.json"), config)
    storage.write_json(os.path.join(folder, "scheduler", "scheduler_config.json"), scheduler)
    storage.write_json(os.path.join(folder, "model_index.json"), index)


def _unet_config(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Their configuration of the network.

    :raises UserError: where they have no such network, or their pipeline would use it wrongly.
    """
    if flags.get("time_scale", 0) not in (0, 1000):
        raise UserError(f"consistency models of diffusers are conditioned on 250 ln(sigma); they do not support "
                        f"--time_scale {flags['time_scale']:g}")
    if flags["arch"] != "unet" or flags["precond"] != "edm":
        raise UserError(f"consistency models of diffusers have --arch unet and --precond edm; they do not support "
                        f"{flags['arch']} and {flags['precond']}")
    widths = _level_widths(flags)
    if widths[0] != flags["num_channels"]:
        raise UserError(f"diffusers needs a first level of num_channels={flags['num_channels']}, but channel_mult "
                        f"{flags['channel_mult']} makes it {widths[0]} wide")
    attention = _attention_levels(flags)

    def types(way: str) -> list[str]:
        plain = PLAIN[way, flags["resblock_updown"]]
        return [WITH_ATTENTION[way] if level in attention else plain for level in range(len(widths))]

    change = "resnet" if flags["resblock_updown"] else "conv"
    return {
        "_class_name": UNET,
        "_diffusers_version": VERSION,
        "sample_size": flags["image_size"],
        "in_channels": flags.get("channels", 3),
        "out_channels": flags.get("channels", 3),
        "layers_per_block": flags["num_res_blocks"],
        "num_class_embeds": flags["num_classes"] if flags["class_cond"] else None,
        "block_out_channels": widths,
        "attention_head_dim": _head_width(flags, {widths[level] for level in attention} | {widths[-1]}),
        "down_block_types": types("down"),
        "up_block_types": types("up")[::-1],
        "resnet_time_scale_shift": "scale_shift" if flags["use_scale_shift_norm"] else "default",
        "attn_norm_num_groups": 32,
        "upsample_type": change,
        "downsample_type": change,
    }


def _head_width(flags: Mapping[str, Any], widths: set[int]) -> int | None:
    """Channels of an attention head, a single number for the network in diffusers; None for one head."""
    if flags["num_head_channels"] != -1:
        return flags["num_head_channels"]
    heads = flags["num_heads"]
    if flags["num_heads_upsample"] not in (-1, heads):
        raise UserError(f"diffusers has equally many heads in encoder and decoder, not {heads} and "
                        f"{flags['num_heads_upsample']}")
    if heads == 1:
        return None
    if len(widths) > 1:
        raise UserError(f"diffusers needs attention heads of one width; num_heads={heads} at levels of "
                        f"{', '.join(map(str, sorted(widths)))} channels gives several")
    return widths.pop() // heads


# --- reading ---------------------------------------------------------------------------------------------------------


def is_folder(path: str) -> bool:
    """Whether a path is a pipeline of diffusers; for one rank."""
    return os.path.isdir(path) and os.path.exists(os.path.join(path, "model_index.json"))


def read(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The flags of the network and its weights, on every rank.

    :raises UserError: for a pipeline of another kind, or files that are missing or damaged.
    """
    config, file = dist.on_main(_read_settings, folder)
    path = os.path.join(folder, "unet", file)
    is_pickle = file.endswith(".bin")
    theirs = dist.load_state_dict(path) if is_pickle else safetensor_files.read(path)
    if not isinstance(theirs, dict) or not all(isinstance(value, Tensor) for value in theirs.values()):
        raise UserError(f"{path} does not contain a dict of tensors; download it again")
    flags = _flags_of(config, folder)
    demand_held(flags, size_of(theirs), folder)
    try:
        return flags, _renamed(theirs, flags)
    except RuntimeError as error:                                   # parts of other shapes
        raise UserError(f"{path} does not contain the network of its config.json: {error}") from None


def _renamed(theirs: dict[str, Tensor], flags: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights under the names of this toolkit, in float32; those of no known name keep theirs."""
    thirds: dict[str, list[Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for name, (ours, third) in _names_for(flags).items():
        if name not in theirs:
            continue                                                # reported when the weights are used
        value = theirs.pop(name)
        if third is None:
            weights[ours] = value
        else:
            thirds.setdefault(ours, []).append(value)
    weights |= {name: th.cat(parts) for name, parts in thirds.items()} | theirs
    convolutions = (".qkv.weight", ".proj_out.weight")
    return {
        name: (value[..., None, None] if name.endswith(convolutions) and value.ndim == 2 else value).float()
        for name, value in weights.items()
    }


def _read_settings(folder: str) -> tuple[dict[str, Any], str]:
    """The network's configuration and the name of its file of weights; for one rank."""
    def read_object(*place: str) -> dict[str, Any]:
        content = read_json(os.path.join(folder, *place), SETTINGS)
        if not isinstance(content, dict):
            raise ValueError(f"{place[-1]} holds a {type(content).__name__}, not an object")
        return content

    try:
        index = read_object("model_index.json")
        pipeline, id2label = index.get("_class_name"), index.get("id2label")
        config = read_object("unet", "config.json")
        scheduler = read_object("scheduler", "scheduler_config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a complete folder of diffusers: {error}") from None
    if pipeline != PIPELINE or config.get("_class_name") != UNET:
        raise UserError(f"{folder} holds a {str(pipeline)[:100]} with a {str(config.get('_class_name'))[:100]}, not a "
                        f"{PIPELINE} with a {UNET}")
    for name in WEIGHTS:
        if os.path.exists(os.path.join(folder, "unet", name)):
            levels = {"sigma_min": scheduler.get("sigma_min", 0.002), "sigma_max": scheduler.get("sigma_max", 80.0)}
            return config | levels | {"id2label": id2label}, name
    raise UserError(f"{os.path.join(folder, 'unet')} has no weights: none of {', '.join(WEIGHTS)}")


def _check_config(config: Mapping[str, Any], folder: str) -> None:
    """:raises UserError: unless the values that make the network are there and of their types."""
    def count(name: str, may_be_none: bool = False) -> None:
        value = config.get(name)
        if not (type(value) is int and value > 0 or may_be_none and value is None):
            raise UserError(f"{folder}: {name} is {shown(value)}, not a whole number above 0; download config.json "
                            "again")

    for name in ("sample_size", "layers_per_block"):
        count(name)
    if "in_channels" in config:
        count("in_channels")
    for name in ("num_class_embeds", "attention_head_dim"):
        count(name, may_be_none=True)
    widths, downs = config.get("block_out_channels"), config.get("down_block_types")
    if not (isinstance(widths, list) and isinstance(downs, list) and 0 < len(widths) == len(downs)
            and all(type(width) is int and width > 0 for width in widths)):
        raise UserError(f"{folder}: block_out_channels {shown(widths)} and down_block_types {shown(downs)} do not "
                        "describe the levels of a network; download config.json again")
    for name in ("sigma_min", "sigma_max"):
        if type(config[name]) not in (int, float) or not 0 < config[name] < float("inf"):
            raise UserError(f"{folder}: {name} is {shown(config[name])}, not a number above 0")


def _flags_of(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The flags that make the network of a configuration.

    :raises UserError: for a network that the U-Net here cannot be.
    """
    _check_config(config, folder)
    widths, downs = config["block_out_channels"], config["down_block_types"]
    attention = [level for level, kind in enumerate(downs) if kind == WITH_ATTENTION["down"]]
    updown = config.get("downsample_type", "conv") == "resnet"
    legal = (WITH_ATTENTION["down"], PLAIN["down", updown])
    if strange := [kind for kind in downs if kind not in legal]:
        raise UserError(f"{folder} has blocks of kind {str(strange[0])[:100]}; this toolkit supports "
                        f"{' and '.join(legal)}")
    classes, head = config.get("num_class_embeds"), config.get("attention_head_dim")
    return {
        "arch": "unet",
        "image_size": config["sample_size"],
        "channels": config.get("in_channels", 3),
        "num_channels": widths[0],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": ",".join(f"{width / widths[0]:g}" for width in widths),
        "attention_resolutions": ",".join(str(config["sample_size"] >> level) for level in attention),
        "num_heads": 1 if head is None else 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1 if head is None else head,
        "class_cond": bool(classes),
        "num_classes": classes or 0,
        "use_scale_shift_norm": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "resblock_updown": updown,
        "augment_dim": 0,
        "learn_sigma": False,
        "precond": "edm",
        "sigma_min": config["sigma_min"],
        "sigma_max": config["sigma_max"],
        "training_mode": "consistency_distillation",
        "class_names": _names_of(config.get("id2label"), folder) if classes else (),
    }


def _names_of(id2label: Any, folder: str) -> ClassNames:
    """The names that {"0": "cat", "1": "dog"} gives to classes 0, 1, ...; () without any.

    :raises UserError: if it is anything else.
    """
    try:
        return checked([id2label[str(number)] for number in range(len(id2label or ()))])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: id2label in model_index.json is not a table of class names: {error!r}") from None
