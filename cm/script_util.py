"""openai/consistency_models' `cm.script_util`: flags from dictionaries, and networks from flags.

A compatibility module: the flags are those of `cm.config.schema`, networks come from `cm.networks.build`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from cm.config import flags
from cm.config.arguments import shared_fields, takes_fields
from cm.config.objective_schema import ConsistencyConfig
from cm.config.schema import DiffusionConfig, ModelConfig
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
"""The default number of classes of a class-conditional network: that of ImageNet."""

TOTAL_TRAINING_STEPS = 600_000


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of network and diffusion with their defaults; `create_model_and_diffusion` takes each of them."""
    return {**flags.defaults_of(ModelConfig), **flags.defaults_of(DiffusionConfig)}


def cm_train_defaults() -> dict[str, Any]:
    """The flags of consistency training with their defaults."""
    return {**flags.defaults_of(ConsistencyConfig), "total_training_steps": TOTAL_TRAINING_STEPS}


@takes_fields(NetworkConfig)
def create_model(config: NetworkConfig) -> Network:
    """`build_network`, with the fields of `NetworkConfig` as arguments; --arch unet gives the original's `UNetModel`.

    The first sixteen fields are openai/consistency_models' argument list, in its order.

    :raises UserError: as `build_network`.
    """
    model = build_network(config, UNetModel.of)
    if isinstance(model, UNetModel):
        model.use_fp16 = config.use_fp16
    return model


@dataclass(frozen=True)
class ModelAndDiffusionArguments:
    """openai/consistency_models' argument list of `create_model_and_diffusion`, followed by arguments that it lacks.

    `cm.config.schema` explains them.
    """

    image_size: int
    class_cond: bool
    learn_sigma: bool
    num_channels: int
    num_res_blocks: int
    channel_mult: str
    num_heads: int
    num_head_channels: int
    num_heads_upsample: int
    attention_resolutions: str
    dropout: float
    use_checkpoint: bool
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_fp16: bool
    use_new_attention_order: bool
    weight_schedule: str
    sigma_min: float = DiffusionConfig.sigma_min
    sigma_max: float = DiffusionConfig.sigma_max
    distillation: bool = False
    _: KW_ONLY
    num_classes: int = NetworkConfig.num_classes
    arch: str = NetworkConfig.arch
    augment_dim: int = NetworkConfig.augment_dim
    channels: int = NetworkConfig.channels
    null_class: bool = NetworkConfig.null_class
    second_time: bool = NetworkConfig.second_time
    dropout_resolutions: str = NetworkConfig.dropout_resolutions
    loss_norm: str = ConsistencyConfig.loss_norm
    precond: str = DiffusionConfig.precond
    time_scale: float = DiffusionConfig.time_scale


@takes_fields(ModelAndDiffusionArguments)
def create_model_and_diffusion(arguments: ModelAndDiffusionArguments) -> tuple[Network, KarrasDenoiser]:
    """Network and denoiser from flags with guided-diffusion's names, the fields of `ModelAndDiffusionArguments`.

    With `distillation`, the network is scaled as a consistency function.

    :raises UserError: if the flags do not describe a network; the message names the flag.
    """
    model = create_model(**shared_fields(NetworkConfig, arguments))
    diffusion = create_diffusion(
        **shared_fields(DiffusionConfig, arguments), distillation=arguments.distillation,
        loss_norm=arguments.loss_norm, arch=arguments.arch,
    )
    return model, diffusion


create_ema_and_scales_fn = ema_and_scales
"""The curriculum of a run: a function from the step to (target decay rate, number of noise levels)."""


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add a flag per key, with the type of its default; None means a string, and a boolean takes a value."""
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
