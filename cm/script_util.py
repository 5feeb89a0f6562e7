"""From resolved flags to networks, diffusions and schedules; guided-diffusion's function names are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch as th
from torch import Tensor, nn

from cm import dist_util
from cm.checkpoints import diffusers_folder, edm_pickle, guided, openai
from cm.checkpoints.weights import check as check_weights
from cm.checkpoints.weights_file import WeightsFile, look_at
from cm.collectives import read_everywhere
from cm.config import (
    CONSISTENCY_MODES,
    TRAINING_MODES,
    ConsistencyConfig,
    DiffusionConfig,
    ModelConfig,
    ObjectiveConfig,
)
from cm.curricula import ema_and_scales
from cm.flags import Settings, check, convert, str2bool
from cm.interfaces import Objective
from cm.karras_diffusion import KarrasDenoiser
from cm.networks import PUBLISHED_CLASSES, Network, create_model, parse_channel_mult, parse_resolutions
from cm.objectives import DENOISING
from cm.registry import UserError, lookup
from cm.resample import create_named_schedule_sampler

FLAGS = {flag.name: flag for section in (ModelConfig, DiffusionConfig) for flag in dataclasses.fields(section)}
HEADS = ("num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order")

create_ema_and_scales_fn = ema_and_scales

__all__ = [
    "add_dict_to_argparser", "args_to_dict", "cm_train_defaults", "create_ema_and_scales_fn", "create_model",
    "create_model_and_diffusion", "model_and_diffusion_defaults", "str2bool",
]


def defaults_of(section: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(section)}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of network and diffusion with their defaults."""
    return {**defaults_of(ModelConfig), **defaults_of(DiffusionConfig)}


def cm_train_defaults() -> dict[str, Any]:
    """The flags of consistency training with their defaults."""
    return defaults_of(ConsistencyConfig)


def create_diffusion(
    weight_schedule: str = "karras",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    distillation: bool = False,
    loss_norm: str = "lpips",
    precond: str = "edm",
    arch: str = "unet",
) -> KarrasDenoiser:
    """The denoiser around a network; `distillation` chooses the boundary scalings of a consistency model."""
    return KarrasDenoiser(
        sigma_data=0.5, sigma_max=sigma_max, sigma_min=sigma_min, distillation=distillation,
        weight_schedule=weight_schedule, loss_norm=loss_norm, precond=precond,
        time_scale=1000.0 if arch == "unet" else 1.0,
    )


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
    weight_schedule: str,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    distillation: bool = False,
    loss_norm: str = "lpips",
    num_classes: int = PUBLISHED_CLASSES,
    precond: str = "edm",
    arch: str = "unet",
    augment_dim: int = 0,
) -> tuple[Network, KarrasDenoiser]:
    """Network and denoiser from flags, by guided-diffusion's names."""
    model = create_model(
        image_size, num_channels, num_res_blocks, channel_mult, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, dropout,
        resblock_updown, use_fp16, use_new_attention_order, num_classes, arch, augment_dim,
    )
    return model, create_diffusion(weight_schedule, sigma_min, sigma_max, distillation, loss_norm, precond, arch)


def model_from(settings: Settings, **changes: Any) -> Network:
    """The network of resolved settings, in float32; `changes` override single flags."""
    config = dataclasses.asdict(settings.section(ModelConfig)) | {"use_fp16": False} | changes
    return create_model(**config)


def place(model: nn.Module, device: th.device) -> nn.Module:
    """Put a network where it runs, in the memory format in which its convolutions are fastest."""
    return model.to(device, memory_format=th.channels_last)


def diffusion_from(settings: Settings, distillation: bool, loss_norm: str = "l2") -> KarrasDenoiser:
    config = dataclasses.asdict(settings.section(DiffusionConfig))
    return create_diffusion(**config, distillation=distillation, loss_norm=loss_norm, arch=settings.values["arch"])


def options_of(kind: type) -> list[str]:
    """The flags of a denoising objective alone: the fields of its class that have the name of a flag."""
    fields = {field.name for field in dataclasses.fields(kind)}
    return [field.name for field in dataclasses.fields(ObjectiveConfig) if field.name in fields]


def follow_objective(settings: Settings) -> None:
    """The settings that the objective was published with, where nobody asks for others.

    :raises UserError: for a flag that only another objective uses.
    """
    objective, values = settings.values["objective"], settings.values
    kind = lookup(DENOISING, objective, "objective")
    settings.replace(**{name: value for name, value in kind.defaults.items() if name not in settings.given})
    own, defaults = options_of(kind), defaults_of(ObjectiveConfig)
    for name in (name for other in DENOISING.values() for name in options_of(other) if name not in own):
        # A file may hold every flag of another run; there only a value that somebody chose has been lost.
        by_flag = settings.given.get(name, "").startswith("--")
        if by_flag or name in settings.given and values[name] != defaults[name]:
            users = " or ".join(f"--objective {other}" for other in DENOISING if name in options_of(DENOISING[other]))
            raise UserError(f"{settings.given[name]}: {name}={values[name]!r} is for {users}, but this run has "
                            f"--objective {objective}, which does not use it; drop it")


def objective_from(settings: Settings, diffusion: KarrasDenoiser) -> Objective:
    """The denoising objective that the flags describe."""
    kind = lookup(DENOISING, settings.values["objective"], "objective")
    law = create_named_schedule_sampler(settings.values["schedule_sampler"], diffusion)
    return kind.of(diffusion, law, {name: settings.values[name] for name in options_of(kind)})


# What the authors of each precond trained their networks with.
PUBLISHED_LAW = {name: {"schedule_sampler": name, "weight_schedule": "snr"} for name in ("vp", "ve", "iddpm", "ddpm")}


def follow_precond(settings: Settings) -> None:
    """The noise levels and weights that the precond was published with, where no flag asks for others."""
    published = PUBLISHED_LAW.get(settings.values["precond"], {})
    settings.replace(**{name: value for name, value in published.items() if name not in settings.given})


def attend_where_possible(settings: Settings) -> None:
    """The default attention resolutions, without those that halving an image of this size does not reach."""
    if "attention_resolutions" not in settings.given:
        sides = parse_resolutions(settings.values["attention_resolutions"])
        reached = {settings.values["image_size"] / 2**level for level in range(16)}
        fitting = [side for side in sides if side in reached]
        settings.replace(attention_resolutions=",".join(map(str, fitting)))


def adopt_checkpoint(settings: Settings, flag: str, *, also: tuple[str, ...] = ()) -> WeightsFile:
    """Take the architecture, and the flags named in `also`, from the file of weights that `flag` names.

    They stand in the manifest beside it; without one (the published files) they are read off the weights, or stand in
    an EDM pickle or a folder of diffusers itself. The file is then `settings.sources[flag]`, too.

    :raises UserError: if the file is missing or no U-Net's, if its weights are not those of one network, if another
        flag contradicts it, or if it leaves something unsaid that no flag says either.
    """
    path = settings.values[flag]
    source = settings.sources[flag] = WeightsFile(path)
    kind, checkpoint = dist_util.on_main(look_at, path)
    if not kind:
        if settings.dry_run:
            return source
        raise UserError(f"--{flag} {path}: no such file")
    if checkpoint is not None:
        adopt(settings, checkpoint.config, also, path)
        source.training_mode = checkpoint.config.get("training_mode")
        return source
    if kind in FOREIGN:
        known, source.weights = FOREIGN[kind](path)
        adopt(settings, known, also, path)
        source.training_mode = known["training_mode"]
        return source
    weights = dist_util.load_state_dict(path)
    side = settings.values["image_size"] if "image_size" in settings.given else None
    known = openai.model_flags(weights, path, side) | openai.published_mode(path)
    demand_the_unsaid(settings, known, also, path)
    adopt(settings, known, also, path)
    heads = {name: settings.values[name] for name in HEADS}
    source.training_mode, source.weights = known.get("training_mode"), guided.to_published_layout(weights, **heads)
    with th.device("meta"):                                 # odd shapes must not ask for more memory than the file has
        check_weights(model_from(settings), source.weights, path)
    return source


def read_edm_pickle(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    net = edm_pickle.read(read_everywhere(path), path)
    return net.flags, net.weights


# Files that tell their flags themselves -> flags and weights, on every rank.
FOREIGN = {"EDM pickle": read_edm_pickle, "diffusers folder": diffusers_folder.read}


def adopt(settings: Settings, known: Mapping[str, Any], also: tuple[str, ...], path: str) -> None:
    """Take over what a manifest, or the weights themselves, say about the network."""
    # Dropout and recomputation change no weights: they are the run's choice.
    own = ("dropout", "use_checkpoint", "use_fp16", "use_new_attention_order", "weight_schedule")
    names = [name for name in (*model_and_diffusion_defaults(), *also) if name in known and name not in own]
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
    settings.adopt(taken, f"the checkpoint {path}")


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


def demand_the_unsaid(settings: Settings, known: Mapping[str, Any], also: tuple[str, ...], path: str) -> None:
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


def choose_precision(precision: str, use_fp16: bool, device: th.device) -> str:
    """fp32, bf16 or fp16; `auto` is bf16 where the hardware multiplies it faster than fp32."""
    if precision == "auto":
        return "bf16" if is_fast_at_bf16(device) else "fp32"
    if precision and use_fp16 and precision != "fp16":
        raise UserError(f"--use_fp16 True contradicts --precision {precision}; drop one of them")
    return precision or ("fp16" if use_fp16 else "fp32")


def is_fast_at_bf16(device: th.device) -> bool:
    if device.type == "cuda":
        return th.cuda.is_bf16_supported(including_emulation=False)
    try:
        features = Path("/proc/cpuinfo").read_text().split("\nflags", 2)[1].split("\n")[0].split()
    except (OSError, IndexError):
        return False
    return "amx_bf16" in features or "avx512_bf16" in features


def add_dict_to_argparser(parser: Any, default_dict: dict[str, Any]) -> None:
    """Add a flag per key, typed by its default: for scripts written against guided-diffusion."""
    for name, value in default_dict.items():
        kind: Callable = str if value is None else str2bool if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args: Any, keys: Any) -> dict[str, Any]:
    return {key: getattr(args, key) for key in keys}


def parse_ts(ts: str) -> tuple[int, ...] | None:
    """'0,22,39' -> (0, 22, 39); None when empty."""
    if not ts:
        return None
    try:
        return tuple(int(word) for word in ts.split(","))
    except ValueError:
        raise UserError(f"--ts {ts!r} is not a list of indices such as 0,22,39") from None
