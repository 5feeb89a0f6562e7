"""Builds networks from their configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch as th
from torch import nn

from cm.errors import UserError
from cm.networks.edm import EDM_NETWORKS, ConditionedNetwork
from cm.networks.unet import UNet, UNetConfig, attention_factors
from cm.registry import lookup

PUBLISHED_CLASSES = 1000                                    # of ImageNet, unless the number is given

Network = UNet | ConditionedNetwork

CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    16: (1, 2, 2),
    8: (1, 2),
}


def parse_channel_mult(channel_mult: str, image_size: int) -> tuple[float, ...]:
    """'1,2,4' -> (1, 2, 4); an empty text gives the default of the image size.

    :raises UserError: if it is no list of positive numbers, or the image size has no default.
    """
    if not channel_mult:
        if image_size not in CHANNEL_MULT:
            raise UserError(
                f"there is no default channel_mult for image_size {image_size} (only for "
                f"{', '.join(map(str, sorted(CHANNEL_MULT)))}); give --channel_mult, such as 1,2,4"
            )
        return CHANNEL_MULT[image_size]
    try:
        widths = tuple(float(word) for word in channel_mult.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) <= 0:
        raise UserError(f"--channel_mult {channel_mult!r} is not a list of positive numbers such as 1,2,4")
    return tuple(int(width) if width == int(width) else width for width in widths)


def parse_resolutions(resolutions: str, flag: str = "attention_resolutions") -> tuple[int, ...]:
    """'32,16,8' -> (32, 16, 8).

    :raises UserError: if it is no list of whole numbers; the message names the flag.
    """
    try:
        return tuple(int(word) for word in resolutions.split(",") if word.strip())
    except ValueError:
        raise UserError(f"--{flag} {resolutions!r} is not a list of image sides such as 32,16,8") from None


@dataclass(frozen=True)
class NetworkConfig:
    """What a network is built from. The fields are flags of `cm.config.schema.ModelConfig`, which explains them."""

    image_size: int
    num_channels: int
    num_res_blocks: int
    channel_mult: str = ""
    learn_sigma: bool = False
    class_cond: bool = False
    use_checkpoint: bool = False
    attention_resolutions: str = "16"
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    dropout: float = 0.0
    resblock_updown: bool = False
    use_fp16: bool = False
    use_new_attention_order: bool = False
    num_classes: int = PUBLISHED_CLASSES
    arch: str = "unet"
    augment_dim: int = 0
    channels: int = 3
    null_class: bool = False
    second_time: bool = False
    dropout_resolutions: str = ""

    def dropout_sides(self, levels: int) -> tuple[int, ...]:
        """The sides at which there is dropout, all of them levels of the network; none for all.

        :param levels: their number.
        :raises UserError: for a side that no level has.
        """
        sides = parse_resolutions(self.dropout_resolutions, "dropout_resolutions")
        attention_factors(self.image_size, sides, levels, "dropout")
        return sides


def build_network(config: NetworkConfig, unet: Callable[[UNetConfig], UNet] = UNet) -> Network:
    """The network of a configuration.

    :param unet: makes the network of --arch unet.
    :raises UserError: if there is no such network; the message names the flag.
    """
    if config.null_class and not config.class_cond:
        raise UserError("--null_class True needs a class-conditional network: add --class_cond True, or drop it")
    if config.learn_sigma:
        raise UserError("--learn_sigma True: these networks predict no variance; drop the flag")
    return unet(_unet_config(config)) if config.arch == "unet" else _build_edm(config)


def _unet_config(config: NetworkConfig) -> UNetConfig:
    widths = parse_channel_mult(config.channel_mult, config.image_size)
    factors = attention_factors(config.image_size, parse_resolutions(config.attention_resolutions))
    if config.augment_dim:
        raise UserError(f"--augment_dim {config.augment_dim}: the U-Net of --arch unet takes no augmentation labels; "
                        f"choose one of: {', '.join(name for name in EDM_NETWORKS if name != 'edm2')}")
    return UNetConfig(
        image_size=config.image_size,
        in_channels=config.channels,
        model_channels=config.num_channels,
        out_channels=config.channels,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=factors,
        dropout=config.dropout,
        channel_mult=widths,
        num_classes=_classes(config) or None,
        use_checkpoint=config.use_checkpoint,
        num_heads=config.num_heads,
        num_head_channels=config.num_head_channels,
        num_heads_upsample=config.num_heads_upsample,
        use_scale_shift_norm=config.use_scale_shift_norm,
        resblock_updown=config.resblock_updown,
        null_class=config.null_class,
        second_time=config.second_time,
        dropout_resolutions=config.dropout_sides(len(widths)),
    )


def _build_edm(config: NetworkConfig) -> ConditionedNetwork:
    widths = parse_channel_mult(config.channel_mult, config.image_size)
    resolutions = parse_resolutions(config.attention_resolutions)
    attention_factors(config.image_size, resolutions)               # raises for a resolution that no level has
    has_own_heads = config.arch in ("adm", "edm2") and config.num_head_channels != -1
    return lookup(EDM_NETWORKS, config.arch, "arch")(
        img_resolution=config.image_size,
        in_channels=config.channels,
        out_channels=config.channels,
        label_dim=_classes(config),
        augment_dim=config.augment_dim,
        model_channels=config.num_channels,
        channel_mult=widths,
        num_blocks=config.num_res_blocks,
        attn_resolutions=resolutions,
        dropout=config.dropout,
        use_checkpoint=config.use_checkpoint,
        null_class=config.null_class,
        second_time=config.second_time,
        dropout_resolutions=config.dropout_sides(len(widths)),
        **({"channels_per_head": config.num_head_channels} if has_own_heads else {}),
    )


def _classes(config: NetworkConfig) -> int:
    """The number of classes, 0 for an unconditional network."""
    return (config.num_classes or PUBLISHED_CLASSES) if config.class_cond else 0


def to_device(model: nn.Module, device: th.device) -> nn.Module:
    """Move a network to a device, in the memory format in which its convolutions are fastest."""
    # torch's stubs lack this combination of arguments
    return model.to(device, memory_format=th.channels_last)  # pyright: ignore[reportCallIssue]
