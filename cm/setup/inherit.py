"""What settings inherit from a checkpoint: its architecture, and how it was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch as th
from torch import Tensor

from cm.checkpoints.formats import diffusers, edm_pickle, guided_diffusion, openai
from cm.checkpoints.loading import WeightsFile, look_at
from cm.checkpoints.loading import check as check_weights
from cm.config.flags import Settings, check, convert, defaults_of
from cm.config.schema import (
    CONSISTENCY_MODES,
    TRAINING_MODES,
    DiffusionConfig,
    ModelConfig,
)
from cm.distributed import setup as dist
from cm.distributed.collectives import read_everywhere
from cm.errors import UserError
from cm.networks.build import parse_channel_mult
from cm.setup.model import model_from

FLAGS = {flag.name: flag for section in (ModelConfig, DiffusionConfig) for flag in dataclasses.fields(section)}


HEADS = ("num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order")


def inherit_checkpoint(settings: Settings, flag: str, *, also: tuple[str, ...] = ()) -> WeightsFile:
    """Take the architecture, and the flags named in `also`, from the file of weights that `flag` names.

    They stand in the manifest beside it; without one (the published files) they are read off the weights, or stand in
    an EDM pickle or a folder of diffusers itself. The file is then `settings.sources[flag]`, too.

    :raises UserError: if the file is missing or no U-Net's, if its weights are not those of one network, if another
        flag contradicts it, or if it leaves something unsaid that no flag says either.
    """
    path = settings.values[flag]
    source = settings.sources[flag] = WeightsFile(path)
    kind, checkpoint = dist.on_main(look_at, path)
    if not kind:
        if settings.dry_run:
            return source
        raise UserError(f"--{flag} {path}: no such file")
    if checkpoint is not None:
        inherit_flags(settings, checkpoint.config, also, path)
        source.training_mode = checkpoint.config.get("training_mode")
        return source
    if kind in FOREIGN:
        known, source.weights = FOREIGN[kind](path)
        inherit_flags(settings, known, also, path)
        source.training_mode = known["training_mode"]
        return source
    weights = dist.load_state_dict(path)
    side = settings.values["image_size"] if "image_size" in settings.given else None
    known = openai.model_flags(weights, path, side) | openai.published_mode(path)
    require_unknown_flags(settings, known, also, path)
    inherit_flags(settings, known, also, path)
    heads = {name: settings.values[name] for name in HEADS}
    source.training_mode = known.get("training_mode")
    source.weights = guided_diffusion.to_published_layout(weights, **heads)
    with th.device("meta"):                                 # odd shapes must not ask for more memory than the file has
        check_weights(model_from(settings), source.weights, path)
    return source


def read_edm_pickle(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    net = edm_pickle.read(read_everywhere(path), path)
    return net.flags, net.weights


# Files that tell their flags themselves -> flags and weights, on every rank.
FOREIGN = {"EDM pickle": read_edm_pickle, "diffusers folder": diffusers.read}


def inherit_flags(settings: Settings, known: Mapping[str, Any], also: tuple[str, ...], path: str) -> None:
    """Take over what a manifest, or the weights themselves, say about the network."""
    # Dropout and recomputation change no weights: they are the run's choice.
    own = ("dropout", "use_checkpoint", "use_fp16", "use_new_attention_order", "weight_schedule")
    flags = (*defaults_of(ModelConfig), *defaults_of(DiffusionConfig), *also)
    names = [name for name in flags if name in known and name not in own]
    taken = {name: plain_value(name, known[name], path) for name in names}
    modes = {taken.get("training_mode"), settings.values.get("training_mode")}
    if "training_mode" in settings.given and modes <= set(CONSISTENCY_MODES):
        taken.pop("training_mode")                          # however trained, they are the same kind of network
    if known.get("training_mode") == "edm":                 # the ODE of a diffusion model can be cut anywhere
        taken = {name: value for name, value in taken.items()
                 if name not in ("sigma_min", "sigma_max") or name not in settings.given}
    if "channel_mult" in taken:                             # empty is the same as the default of the size
        side = taken.get("image_size", settings.values["image_size"])
        taken["channel_mult"] = spell_channel_mult(taken["channel_mult"], side)
        if "channel_mult" in settings.given:
            settings.replace(channel_mult=spell_channel_mult(settings.values["channel_mult"], side))
    settings.inherit(taken, f"the checkpoint {path}")


def plain_value(name: str, value: Any, path: str) -> Any:
    """A value of a manifest as its flag would take it; a manifest may have been written by anybody."""
    flag = FLAGS.get(name)
    if flag is None:
        return value
    where = f"the manifest beside {path}"
    value = convert(type(flag.default), value, f"{where}: {name}")
    check(flag, value, where)
    return value


def spell_channel_mult(channel_mult: str, image_size: int) -> str:
    return ",".join(f"{width:g}" for width in parse_channel_mult(channel_mult, image_size))


def require_unknown_flags(settings: Settings, known: Mapping[str, Any], also: tuple[str, ...], path: str) -> None:
    """Weights alone do not tell everything, and a wrong guess would load without a word."""
    given = {*known, *settings.given}
    unsaid = {
        "--image_size": "image_size" not in given,
        "--num_head_channels (or --num_heads)": not given & {"num_head_channels", "num_heads"},
        f"--training_mode ({', '.join(TRAINING_MODES)})": "training_mode" in also and "training_mode" not in given,
    }
    if flags := [flag for flag, is_missing in unsaid.items() if is_missing]:
        raise UserError(f"{path} has no manifest beside it, and its weights do not tell everything about the network: "
                        f"give also {', '.join(flags)}")
