"""A lower bound of the size of a described network: what a file describes must fit into the file.

Descriptions come with weights, in manifests and configs that anybody may have written, and networks are built from them
before they are compared with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cm.errors import UserError
from cm.networks.build import parse_channel_mult

BYTES_EACH = 2                                              # of a parameter in a file, at least
LARGEST_SIDE = 2**14                                        # pixels; of images that any of these networks makes
KERNEL = 9                                                  # weights of a 3x3 convolution for each pair of channels
BOUNDED = ("unet", "ddpmpp", "ncsnpp", "adm", "edm2")
"""--arch of the networks that have the blocks which `least_parameters` counts."""


def least_parameters(flags: Mapping[str, Any]) -> int:
    """A lower bound on the parameters of the network of `flags`, called as in `cm.networks.build.NetworkConfig`.

    Level l, w_l channels wide, has R residual blocks on the way down and R + 1 on the way up, and in each of them a 3x3
    convolution of w_l to w_l channels. The embedding is 4 C wide, and has two layers and a row for each class; that of
    edm2 is as wide as the widest level, and has one layer, of w_0 channels. The first and the last convolution are
    those of the images. Of a network of another kind, such as a plugin's, nothing is known: 0.
    """
    if flags["arch"] not in BOUNDED:
        return 0
    channels = flags["num_channels"]
    mults = parse_channel_mult(flags["channel_mult"], flags["image_size"])
    widths = [max(1, int(mult * channels)) for mult in mults]
    squares = sum(width**2 for width in widths)
    classes = flags["num_classes"] if flags["class_cond"] else 0
    blocks = 2 * flags["num_res_blocks"] + 1
    images = 2 * KERNEL * flags.get("channels", 3) * widths[0]
    if flags["arch"] == "edm2":
        return KERNEL * blocks * squares + images + (widths[0] + classes) * max(widths)
    return KERNEL * blocks * squares + images + 16 * channels**2 + (classes + flags["augment_dim"]) * channels


def demand_held(flags: Mapping[str, Any], file_bytes: int, source: str) -> None:
    """Refuse the description of a network whose weights cannot be in a file.

    :param file_bytes: size of the file of weights.
    :raises UserError: naming the least that it would need.
    """
    if flags["image_size"] > LARGEST_SIDE:
        raise UserError(f"{source} describes a network for images of side {flags['image_size']:,}; the largest here is "
                        f"{LARGEST_SIDE:,}. Its description is damaged or forged")
    least = BYTES_EACH * least_parameters(flags)
    if least > file_bytes:
        raise UserError(f"{source} describes a network of at least {least:,} bytes and holds {file_bytes:,}: it is "
                        "damaged, or its description (manifest or config) belongs to another network")
