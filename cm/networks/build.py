"""From flags to networks."""

from __future__ import annotations

import torch as th
from torch import nn

from cm.errors import UserError
from cm.networks.edm import EDM_NETWORKS, EDMNetwork
from cm.networks.unet import UNetModel, attention_factors
from cm.registry import lookup

PUBLISHED_CLASSES = 1000                                    # of ImageNet, where nothing else is known

Network = UNetModel | EDMNetwork

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
    """'1,2,4' -> (1, 2, 4); empty gives the default of the size.

    :raises UserError: if it is no list of positive numbers, or the size has no default.
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


def parse_resolutions(attention_resolutions: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in attention_resolutions.split(",") if word.strip())
    except ValueError:
        raise UserError(
            f"--attention_resolutions {attention_resolutions!r} is not a list of image sides such as 32,16,8"
        ) from None


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
    num_classes: int = PUBLISHED_CLASSES,
    arch: str = "unet",
    augment_dim: int = 0,
) -> Network:
    """The network that the flags describe; see `cm.config.schema.ModelConfig`.

    :raises UserError: if the flags describe no network, naming the flag.
    """
    if learn_sigma:
        raise UserError("--learn_sigma True: these networks predict no variance; drop the flag")
    widths = parse_channel_mult(channel_mult, image_size)
    resolutions = parse_resolutions(attention_resolutions)
    factors = attention_factors(image_size, resolutions)
    classes = (num_classes or PUBLISHED_CLASSES) if class_cond else 0
    if arch != "unet":
        return lookup(EDM_NETWORKS, arch, "arch")(
            img_resolution=image_size,
            in_channels=3,
            out_channels=3,
            label_dim=classes,
            augment_dim=augment_dim,
            model_channels=num_channels,
            channel_mult=widths,
            num_blocks=num_res_blocks,
            attn_resolutions=resolutions,
            dropout=dropout,
            use_checkpoint=use_checkpoint,
            **({"channels_per_head": num_head_channels} if arch == "adm" and num_head_channels != -1 else {}),
        )
    if augment_dim:
        raise UserError(f"--augment_dim {augment_dim}: the U-Net of --arch unet takes no augmentation labels; choose "
                        f"one of: {', '.join(EDM_NETWORKS)}")
    return UNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=factors,
        dropout=dropout,
        channel_mult=widths,
        num_classes=classes or None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


def to_device(model: nn.Module, device: th.device) -> nn.Module:
    """Put a network where it runs, in the memory format in which its convolutions are fastest."""
    return model.to(device, memory_format=th.channels_last)
