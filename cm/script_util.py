"""openai/consistency_models' `cm.script_util`: flags by dictionaries, and networks from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cm.config.flags import defaults_of, str2bool
from cm.config.schema import (
    ConsistencyConfig,
    DiffusionConfig,
    ModelConfig,
)
from cm.karras_diffusion import KarrasDenoiser
from cm.networks.build import PUBLISHED_CLASSES, Network, create_model
from cm.setup.model import create_diffusion


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of network and diffusion with their defaults."""
    return {**defaults_of(ModelConfig), **defaults_of(DiffusionConfig)}


def cm_train_defaults() -> dict[str, Any]:
    """The flags of consistency training with their defaults."""
    return defaults_of(ConsistencyConfig)


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


def add_dict_to_argparser(parser: Any, default_dict: dict[str, Any]) -> None:
    """Add a flag per key, typed by its default: for scripts written against guided-diffusion."""
    for name, value in default_dict.items():
        kind: Callable = str if value is None else str2bool if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args: Any, keys: Any) -> dict[str, Any]:
    return {key: getattr(args, key) for key in keys}
