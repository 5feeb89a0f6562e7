"""The settings that are inherited from a checkpoint: its architecture, and how it was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch as th

from cm.checkpoints import averages, manifest
from cm.checkpoints.formats import FORMATS, described, guided_diffusion, openai, safetensor_files
from cm.checkpoints.loading import WeightsFile, look_at
from cm.checkpoints.loading import check as check_weights
from cm.checkpoints.serialization import size_of
from cm.config.flags import Settings, check, convert
from cm.config.objective_schema import TRAINING_MODES
from cm.config.schema import DiffusionConfig, LatentConfig, ModelConfig
from cm.data import latents
from cm.data.latents import RECORD
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage, web
from cm.io.untrusted import shown
from cm.logging import logger
from cm.networks.build import parse_channel_mult, parse_resolutions
from cm.networks.extent import demand_held
from cm.objectives import OBJECTIVES
from cm.setup.model import model_from
from cm.setup.weights_path import find_weights

SECTIONS = (ModelConfig, DiffusionConfig, LatentConfig)
FLAGS = {flag.name: flag for section in SECTIONS for flag in dataclasses.fields(section)}
WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")          # of torch.compile and DDP, in either order
HEADS = ("num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order")
OWN = ("dropout", "dropout_resolutions", "use_checkpoint", "use_fp16", "use_new_attention_order", "weight_schedule")
"""Flags that do not change the weights or their meaning: each run chooses its own values."""
UNSAID: dict[str, Any] = {"time_scale": 0.0, "null_class": False, "second_time": False}
"""Flags that older manifests do not contain -> the value that these networks have."""


def inherit_checkpoint(settings: Settings, flag: str, *, also: tuple[str, ...] = ()) -> WeightsFile:
    """Take the architecture, and the flags named in `also`, from the file of weights that `flag` names.

    They are in the manifest next to the file, or in a file or folder of `FORMATS` itself; else (published files) they
    are derived from the weights. The file is also stored in `settings.sources[flag]`.

    :raises UserError: if the file is missing or not a known kind of network, its weights do not fit the network, a flag
        contradicts it, or neither the file nor a flag determines the network completely.
    """
    path = find_weights(settings, flag)
    if web.is_address(path):
        return WeightsFile(path)                            # in a dry run: nothing is downloaded
    source = settings.sources[flag] = WeightsFile(path)
    kind, checkpoint = dist.on_main(look_at, path)
    if not kind:
        if settings.dry_run:
            return source
        raise UserError(f"--{flag} {path}: no such file")
    if checkpoint is not None:
        known = UNSAID | checkpoint.config
        source.class_names = checkpoint.class_names
        source.expected = listed(checkpoint, path) if settings.values.get("verify_weights", True) else None
        if text := averages.warning(checkpoint, path):
            logger.warn(text)
    elif kind in FORMATS:
        known, source.weights = FORMATS[kind].read(path)
        source.class_names = tuple(known.pop("class_names", ()))
        check_tensors(settings, source, known.pop(described.CRC32, None))
        known = UNSAID | known
    else:
        return _inherit_bare(settings, source, also)
    inherit_flags(settings, known, also, path)
    held = dist.on_main(size_on_disk, path) if source.weights is None else size_of(source.weights)
    demand_held(settings.values, held, path)
    source.training_mode = known.get("training_mode")
    levels = known.get("start_scales")
    source.levels = levels if known.get("scale_mode") == "fixed" and type(levels) is int and levels > 0 else None
    return source


def size_on_disk(path: str) -> int:
    """Bytes of a file, or of the files in a folder."""
    within = [storage.join(path, name) for name in storage.files_under(path)] if storage.is_directory(path) else [path]
    return sum(storage.size(name) for name in within)


def check_tensors(settings: Settings, source: WeightsFile, crc32: int | None) -> None:
    """Compare weights with their checksum, if there is one and --verify_weights asks for it.

    :raises UserError: if they differ.
    """
    if crc32 is None or not settings.values.get("verify_weights", True):
        return
    found = safetensor_files.checksum(source.weights or {})
    if found != crc32:
        raise UserError(f"{source.path} is damaged: its tensors have CRC-32 {found:08x}, its description says "
                        f"{crc32:08x}. Copy the file again; --verify_weights False loads it without this check")


def listed(checkpoint: manifest.Checkpoint, path: str) -> Mapping[str, int] | None:
    """Size and CRC-32 of a file from its manifest; None, with a warning, if the manifest does not list the file."""
    facts = checkpoint.facts(path)
    if facts is None:
        logger.warn(f"{path} is not listed in {checkpoint.manifest}: whether it is damaged cannot be checked")
    return facts


def _inherit_bare(settings: Settings, source: WeightsFile, also: tuple[str, ...]) -> WeightsFile:
    """`inherit_checkpoint` for weights without a manifest: most flags follow from names and shapes."""
    verify = settings.values.get("verify_weights", True)
    is_safetensors = source.path.lower().endswith(".safetensors")
    weights = safetensor_files.read(source.path) if is_safetensors else dist.load_state_dict(source.path, verify=verify)
    weights = without_wrappers(weights, source.path)
    side = settings.values["image_size"] if settings.is_given("image_size") else None
    known = openai.model_flags(weights, source.path, side, settings.values["null_class"])
    known |= openai.published_mode(source.path)
    require_unknown_flags(settings, known, also, source.path)
    inherit_flags(settings, known, also, source.path)
    heads = {name: settings.values[name] for name in HEADS}
    source.training_mode = known.get("training_mode")
    source.weights = guided_diffusion.to_published_layout(weights, **heads)
    with th.device("meta"):                                 # odd shapes must not ask for more memory than the file has
        check_weights(model_from(settings), source.weights, source.path)
    return source


def without_wrappers(weights: Any, path: str) -> Any:
    """A state dict without the prefixes that DDP and torch.compile put before every name."""
    for prefix in WRAPPERS:
        while isinstance(weights, Mapping) and weights and all(str(name).startswith(prefix) for name in weights):
            logger.log(f"{path}: the names of the weights begin with {prefix}, which is removed")
            weights = {str(name).removeprefix(prefix): value for name, value in weights.items()}
    return weights


def inherit_resumed(settings: Settings) -> None:
    """Take the architecture from the checkpoint that --resume or --resume_checkpoint names.

    :raises UserError: if there is no such checkpoint, or another flag contradicts it.
    """
    resume = settings.values["resume"]
    if resume not in ("auto", "never"):
        found = dist.on_main(manifest.find, resume, settings.values.get("verify_weights", True))
        inherit_flags(settings, UNSAID | found.config, (), resume)
        settings.sources["resume"] = WeightsFile(found.manifest, class_names=found.class_names)
        demand_held(settings.values, sum(facts["size"] for facts in found.files.values()), found.manifest)
    elif settings.values["resume_checkpoint"]:
        inherit_checkpoint(settings, "resume_checkpoint")


# --- merging ---------------------------------------------------------------------------------------------------------


def inherit_flags(settings: Settings, known: Mapping[str, Any], also: tuple[str, ...], path: str) -> None:
    """Set the flags of the network to the values of a manifest, or to those derived from the weights.

    :raises UserError: if a given flag contradicts them, or a value is not allowed for its flag.
    """
    known = {"channels": ModelConfig.channels, **known}     # older manifests do not say: all were RGB
    flags = (*FLAGS, *also)
    taken = {name: plain_value(name, known[name], path) for name in flags if name in known and name not in OWN}
    for policy in MERGE_POLICIES:
        policy(settings, taken, known)
    settings.inherit(taken, f"the checkpoint {path}")


Taken = dict[str, Any]


def _same_result(settings: Settings, taken: Taken, known: Mapping[str, Any]) -> None:
    """Consistency models are the same kind of network for any training method."""
    kinds = [OBJECTIVES.get(str(each.get("training_mode"))) for each in (taken, settings.values)]
    alike = all(kind is not None and kind.distillation for kind in kinds)
    if settings.is_given("training_mode") and alike:
        del taken["training_mode"]


def _free_levels(settings: Settings, taken: Taken, known: Mapping[str, Any]) -> None:
    """A diffusion model can be sampled over other noise levels than those in its checkpoint."""
    if known.get("training_mode") == "edm":
        for name in ("sigma_min", "sigma_max"):
            if settings.is_given(name):
                taken.pop(name, None)


def _one_spelling_of_widths(settings: Settings, taken: Taken, known: Mapping[str, Any]) -> None:
    """An empty channel_mult is the same as the default for the image size."""
    if "channel_mult" in taken:
        side = taken.get("image_size", settings.values["image_size"])
        taken["channel_mult"] = spell_channel_mult(taken["channel_mult"], side)
        if settings.is_given("channel_mult"):
            settings.replace(channel_mult=spell_channel_mult(settings.values["channel_mult"], side))


def _same_attention(settings: Settings, taken: Taken, known: Mapping[str, Any]) -> None:
    """The order of attention resolutions does not matter, nor do resolutions that the network does not have."""
    name = "attention_resolutions"
    if name not in taken or not settings.is_given(name):
        return
    size = taken.get("image_size", settings.values["image_size"])
    levels = len(parse_channel_mult(taken.get("channel_mult", settings.values["channel_mult"]), size))
    sides = {size // 2**level for level in range(levels)}
    own, theirs = (sides & set(parse_resolutions(value)) for value in (settings.values[name], taken[name]))
    if own == theirs:
        settings.replace(**{name: taken[name]})


def _new_clock(settings: Settings, taken: Taken, known: Mapping[str, Any]) -> None:
    """A diffusion model that starts from the weights of another may have another time_scale."""
    values = settings.values
    fine_tunes = values.get("resume_checkpoint") and values.get("training_mode") == "edm"
    if fine_tunes and settings.is_given("time_scale") and values["time_scale"] != taken.get("time_scale"):
        logger.warn(f"--time_scale {values['time_scale']:g}: the weights of {values['resume_checkpoint']} were trained "
                    "with another one; the first steps will be inaccurate")
        taken.pop("time_scale", None)


def _own_second_time(settings: Settings, taken: Taken, known: Mapping[str, Any]) -> None:
    """A flow map starts from the weights of a teacher without a second time."""
    mode = settings.values.get("training_mode", "")
    if settings.values.get("teacher_model_path") and mode in OBJECTIVES and OBJECTIVES[mode].second_time:
        taken.pop("second_time", None)


def _same_latents(settings: Settings, taken: Taken, known: Mapping[str, Any]) -> None:
    """Records of latents are compared by their values; a checkpoint without a record does not contradict a flag."""
    if not taken.get(RECORD):
        taken.pop(RECORD, None)
        return
    source = "the checkpoint"
    theirs = latents.parse(taken[RECORD], source)
    ours = latents.parse(settings.values.get(RECORD, ""), f"--{RECORD}")
    assert theirs is not None
    record = latents.merged(ours, theirs, (f"--{RECORD}", source)) if ours else theirs
    if RECORD in settings.values:
        settings.replace(**{RECORD: record.text()})
    taken[RECORD] = record.text()


MERGE_POLICIES = (
    _same_result, _free_levels, _one_spelling_of_widths, _same_attention, _new_clock, _own_second_time, _same_latents,
)
"""The differences between a checkpoint and the flags that are not contradictions."""


def plain_value(name: str, value: Any, path: str) -> Any:
    """A value of a manifest, converted and checked as a value of its flag: manifests are untrusted.

    :raises UserError: if the flag does not allow it.
    """
    flag, where = FLAGS.get(name), f"the manifest beside {path}, or the description in it"
    if flag is None:
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: {name}={shown(value)} is neither a word nor a number")
        return value
    value = convert(type(flag.default), value, f"{where}: {name}")
    check(flag, value, where)
    return value


def spell_channel_mult(channel_mult: str, image_size: int) -> str:
    """The widths of the levels, written in one way: "1,2,4"."""
    return ",".join(f"{width:g}" for width in parse_channel_mult(channel_mult, image_size))


def require_unknown_flags(settings: Settings, known: Mapping[str, Any], also: tuple[str, ...], path: str) -> None:
    """Weights alone do not tell everything, and a wrong guess would load without a warning.

    :raises UserError: naming the flags that are still needed.
    """
    given = {*known, *settings.given}
    unsaid = {
        "--image_size": "image_size" not in given,
        "--num_head_channels (or --num_heads)": not given & {"num_head_channels", "num_heads"},
        f"--training_mode ({', '.join(TRAINING_MODES)})": "training_mode" in also and "training_mode" not in given,
    }
    if flags := [flag for flag, is_missing in unsaid.items() if is_missing]:
        raise UserError(f"{path} has no manifest next to it, and its weights do not determine the network completely: "
                        f"also give {', '.join(flags)}")
