"""Folders of diffusers' AutoencoderKL, the VAE that makes latents of images and images of latents.

The folder is read as data: its settings within bounds, its weights as tensors alone. The network is diffusers' own, an
optional package. Nothing is asked of the network, and no code of the folder is run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch as th
from torch import Tensor, nn

from cm.checkpoints import loading
from cm.checkpoints.formats import safetensor_files
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io.budget import SETTINGS, read_json
from cm.io.torchvision_shim import import_torchvision
from cm.io.untrusted import shown

KIND = "AutoencoderKL"
SETTINGS_FILE = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
           "diffusion_pytorch_model.fp16.safetensors")
BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")
LARGEST_COUNT = 32                                                  # of levels, and of blocks on one
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of the layers of attention, in files of before diffusers 0.15 -> today's."""
OLD = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(OLD_NAMES)})\.(weight|bias)")


class LoadedVae(NamedTuple):
    """What a folder holds.

    :param name: of the folder, for messages.
    :param sha256: of the weights, the same for every format of the file.
    :param factor: pixels of an image for each of a latent, on a side.
    """

    model: nn.Module
    name: str
    sha256: str
    channels: int
    factor: int


def read(folder: str, flag: str) -> LoadedVae:
    """The VAE of a folder, in float32 and ready to be evaluated, on every rank's CPU.

    :param flag: that names the folder, for messages.
    :raises UserError: on every rank, if diffusers is missing, or the folder holds no VAE for colour images, or one that
        is damaged.
    """
    config, path = dist.on_main(_look_at, folder, flag)
    weights = {_new_name(name): value.float() for name, value in _tensors_of(path).items()}
    with th.device("meta"):
        model = _network(config, folder)
    shapes = model.state_dict()
    weights = {
        name: value[..., 0, 0] if name in shapes and value.ndim == shapes[name].ndim + 2 else value
        for name, value in weights.items()                          # attention was a convolution at first
    }
    loading.make(model, weights, path)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    name = os.path.basename(os.path.abspath(folder))
    model.requires_grad_(False).eval()
    return LoadedVae(model, name, digest(weights), config.get("latent_channels", 4), factor)


def held_bytes(folder: str) -> int:
    """Bytes of the network of a folder in float32, by the size of its file; 0 without one. For one rank."""
    for name in WEIGHTS:
        if os.path.exists(path := os.path.join(folder, name)):
            return os.path.getsize(path) * (2 if ".fp16." in name else 1)
    return 0


def digest(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names, the shapes and the float32 values of tensors, in the order of their names."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name}{list(value.shape)}".encode())
        found.update(value.float().contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def _network(config: Mapping[str, Any], folder: str) -> nn.Module:
    """:raises UserError: if diffusers is missing, or does not make a network of these settings."""
    try:
        import_torchvision()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise UserError(f"a VAE needs the package diffusers: pip install 'consistency-toolkit[latents]', or pip "
                        f"install diffusers ({error})") from None
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        return AutoencoderKL(**known)
    except Exception as error:                                      # settings from anybody can lead to any
        raise UserError(f"{os.path.join(folder, SETTINGS_FILE)} does not describe an {KIND} that the installed "
                        f"diffusers can create: {type(error).__name__}: {error}") from None


def _look_at(folder: str, flag: str) -> tuple[dict[str, Any], str]:
    """The settings in a folder, and the path of its weights; for one rank."""
    place = os.path.join(folder, SETTINGS_FILE)
    try:
        config = read_json(place, SETTINGS)
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {folder} is not a folder of a VAE: {place} cannot be read: {error}. Give the "
                        f"folder of a diffusers {KIND}, such as a download of stabilityai/sd-vae-ft-mse") from None
    kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if kind != KIND:
        raise UserError(f"--{flag} {folder} holds a {shown(kind)}, not an {KIND}")
    _check(config, place)
    for name in WEIGHTS:
        if os.path.exists(path := os.path.join(folder, name)):
            return config, path
    raise UserError(f"--{flag} {folder} has no weights: none of {', '.join(WEIGHTS)}")


def _check(config: Mapping[str, Any], place: str) -> None:
    """:raises UserError: unless the settings make a network of colour images that a folder could hold."""
    widths, blocks = config.get("block_out_channels"), config.get("layers_per_block", 1)
    levels: list[Any] = widths if isinstance(widths, list) else []
    counts = [*levels, blocks, config.get("latent_channels", 4), config.get("norm_num_groups", 32)]
    few = 0 < len(levels) <= LARGEST_COUNT and all(type(n) is int and n > 0 for n in counts) and blocks <= LARGEST_COUNT
    if not few:
        raise UserError(f"{place}: block_out_channels {shown(widths)}, layers_per_block {shown(blocks)}, "
                        "latent_channels or norm_num_groups are not valid sizes of a network; download it again")
    for name in ("down_block_types", "up_block_types"):
        kinds = config.get(name)
        if not isinstance(kinds, list) or len(kinds) != len(levels) or not set(map(str, kinds)) <= set(BLOCKS):
            raise UserError(f"{place}: {name} {shown(kinds)} is not one of {', '.join(BLOCKS)} for each level")
    if config.get("latent_channels", 4) in (1, 3):
        raise UserError(f"{place}: latents of {config['latent_channels']} channels look like images: use a "
                        "VAE with another number of channels")
    colours = [config.get(name, 3) for name in ("in_channels", "out_channels")]
    if colours != [3, 3]:
        raise UserError(f"{place}: it is for images of {shown(colours[0])} channels, and this toolkit makes latents of "
                        "RGB images")


def _tensors_of(path: str) -> Mapping[str, Tensor]:
    """The tensors of a file, on every rank.

    :raises UserError: if it holds anything else.
    """
    tensors = dist.load_state_dict(path) if path.endswith(".bin") else safetensor_files.read(path)
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} does not contain a dict of tensors; download it again")
    return tensors


def _new_name(name: str) -> str:
    match = OLD.fullmatch(name)
    return f"{match[1]}.{OLD_NAMES[match[2]]}.{match[3]}" if match else name
