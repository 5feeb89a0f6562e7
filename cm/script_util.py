"""openai/consistency_models' `cm.script_util`: flags from dictionaries, and networks from flags.

A compatibility module: the flags are those of `cm.config.schema`, networks come from `cm.networks.build`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cm.config import flags
from cm.config.schema import ConsistencyConfig, DiffusionConfig, ModelConfig
from cm.networks.build import PUBLISHED_CLASSES, Network, NetworkConfig, build_network
from cm.objectives.curricula import ema_and_scales
from cm.objectives.karras_denoiser import KarrasDenoiser
from cm.setup.model import create_diffusion
from cm.unet import UNetModel

__all__ = [
    "NUM_CLASSES", "add_dict_to_argparser", "args_to_dict", "cm_train_defaults", "create_ema_and_scales_fn",
    "create_model", "create_model_and_diffusion", "model_and_diffusion_defaults", "str2bool",
]

NUM_CLASSES = PUBLISHED_CLASSES
"""Of a class-conditional network, where nothing else is said: ImageNet's."""

TOTAL_TRAINING_STEPS = 600_000


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of network and diffusion with their defaults; `create_model_and_diffusion` takes each of them."""
    return {**flags.defaults_of(ModelConfig), **flags.defaults_of(DiffusionConfig)}


def cm_train_defaults() -> dict[str, Any]:
    """The flags of consistency training with their defaults."""
    return {**flags.defaults_of(ConsistencyConfig), "total_training_steps": TOTAL_TRAINING_STEPS}


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0.0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    **own: Any,
) -> Network:
    """`build_network` with the arguments of openai/consistency_models; for --arch unet, its `UNetModel`.

    :param own: the fields of `NetworkConfig` that the original has not, such as num_classes and arch.
    :raises TypeError: for an argument that is none of these.
    :raises UserError: as `build_network`.
    """
    config = NetworkConfig(
        image_size, num_channels, num_res_blocks, channel_mult, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, dropout,
        resblock_updown, use_fp16, use_new_attention_order, **own,
    )
    model = build_network(config, UNetModel.of)
    if isinstance(model, UNetModel):
        model.use_fp16 = use_fp16
    return model


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
    **own: Any,
) -> tuple[Network, KarrasDenoiser]:
    """Network and denoiser from flags, by guided-diffusion's names.

    :param distillation: scale the network as a consistency function.
    :param own: what the original has not: loss_norm, precond, time_scale, and those of `create_model`.
    :raises TypeError: for an argument that is none of these.
    :raises UserError: if the flags describe no network, naming the flag.
    """
    of_denoiser = {name: own.pop(name) for name in ("loss_norm", "precond", "time_scale") if name in own}
    model = create_model(
        image_size=image_size, num_channels=num_channels, num_res_blocks=num_res_blocks, channel_mult=channel_mult,
        learn_sigma=learn_sigma, class_cond=class_cond, use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions, num_heads=num_heads, num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm, dropout=dropout,
        resblock_updown=resblock_updown, use_fp16=use_fp16, use_new_attention_order=use_new_attention_order,
        **own,
    )
    diffusion = create_diffusion(
        weight_schedule=weight_schedule, sigma_min=sigma_min, sigma_max=sigma_max, distillation=distillation,
        arch=own.get("arch", "unet"), **of_denoiser,
    )
    return model, diffusion


create_ema_and_scales_fn = ema_and_scales
"""The curriculum of a run: a function from the step to (target decay rate, number of noise levels)."""


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add a flag per key, typed by its default; a default of None makes a string, a boolean is written out."""
    for name, value in default_dict.items():
        kind: Callable[[str], Any] = str if value is None else str2bool if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The flags with these names."""
    return {key: getattr(args, key) for key in keys}


def str2bool(v: str | bool) -> bool:
    """yes/true/t/y/1 and no/false/f/n/0 in any case.

    :raises ArgumentTypeError: for anything else.
    """
    return flags.str2bool(v)
