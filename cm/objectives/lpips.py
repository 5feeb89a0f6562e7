"""The network of the perceptual distance LPIPS (Zhang et al. 2018, arXiv 1801.03924), and its two files of weights."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch as th
from torch import Tensor, nn
from torch.types import Device

from cm.errors import UserError
from cm.io import torch_files
from cm.io.budget import open_regular
from cm.io.downloads import DOWNLOAD_ERRORS, WeightFile, download, path_of, where_files_go
from cm.io.torchvision_shim import import_torchvision

LAYERS = {"3": 64, "8": 128, "15": 256, "22": 512, "29": 512}
"""The last ReLU of each group of VGG-16's convolutions, and its channels."""


LPIPS_WEIGHTS = WeightFile(
    "lpips_weights.pt",
    "https://github.com/photosynthesis-team/photosynthesis.metrics/releases/download/v0.4.0/lpips_weights.pt",
    None,
)
VGG_WEIGHTS = WeightFile(
    "vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"
)
WEIGHT_FILES = (LPIPS_WEIGHTS, VGG_WEIGHTS)

OTHERWISE = "choose another --loss_norm (l1, l2, l2-32, pseudo-huber)"


@cache
def lpips_network(device: Device, dtype: th.dtype = th.float32) -> nn.Module:
    """LPIPS on VGG-16 with average pooling, frozen: (a, b) [N,3,H,W] in [0,1] -> [N]. Built once per device and dtype.

    :raises UserError: if the package `piq` or a file of weights is missing and cannot be downloaded, or is damaged.
    """
    prepare_lpips()
    ContentLoss = import_content_loss()
    # piq.LPIPS is this ContentLoss, but it downloads and unpickles its weights itself, including the unused 123 million
    # of VGG's classifier. Here it gets the layers and weights as arguments.
    network = ContentLoss(
        vgg_features(), layers=list(LAYERS), weights=[weight.to(device, dtype) for weight in layer_weights()],
        replace_pooling=True, normalize_features=True, reduction="none",
    )
    network.mean, network.std = network.mean.to(device, dtype), network.std.to(device, dtype)
    return network.to(device, dtype).eval().requires_grad_(False)


def check_lpips_channels(channels: int) -> None:
    """:raises UserError: for latents, which VGG-16 cannot process."""
    if channels not in (1, 3):
        raise UserError(f"the loss_norm 'lpips' compares pictures, of 1 or 3 channels, not latents of "
                        f"{channels} channels; {OTHERWISE}")


def prepare_lpips() -> None:
    """Download missing files of weights; one rank of a job calls it before all ranks need them.

    :raises UserError: if a package is missing, or a file is and cannot be downloaded; the message says what to do.
    """
    import_content_loss()                                           # the weights are useless without it
    for file in WEIGHT_FILES:
        path = path_of(file)
        if path.exists():
            continue
        try:
            download(file)
        except DOWNLOAD_ERRORS as error:
            raise UserError(
                f"the loss_norm 'lpips' needs {path}, which cannot be downloaded ({error}). "
                "On a machine with internet access, download two files and put them here:\n"
                f"{where_files_go(WEIGHT_FILES)}\nOr {OTHERWISE}."
            ) from None


def import_content_loss() -> Any:
    try:
        import_torchvision()
        from piq import ContentLoss
    except ImportError as error:
        raise UserError(
            f"the loss_norm 'lpips' needs the packages piq and torchvision ({error}): "
            f"run `pip install piq torchvision`, or {OTHERWISE}"
        ) from None
    return ContentLoss


def vgg_features() -> nn.Module:
    """The convolutions of VGG-16. The classifier may be missing from the file."""
    from torchvision.models import vgg16

    with th.device("meta"):                                         # no random weights that would be overwritten
        features = vgg16(weights=None).features
    state = load(VGG_WEIGHTS)
    names = {name: f"features.{name}" for name in features.state_dict()}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), Tensor) for name in names.values()):
        raise broken(VGG_WEIGHTS, "it does not hold the tensors features.0.weight to features.28.bias")
    try:
        features.load_state_dict({name: state[stored] for name, stored in names.items()}, assign=True)
    except RuntimeError as error:
        raise broken(VGG_WEIGHTS, str(error)) from None
    return features


def layer_weights() -> list[Tensor]:
    """A weight for each channel of each layer, [1,C,1,1]."""
    weights = load(LPIPS_WEIGHTS)
    sizes = [weight.numel() if isinstance(weight, Tensor) else None for weight in weights]
    if sizes != list(LAYERS.values()):
        raise broken(LPIPS_WEIGHTS, f"it should hold tensors of {list(LAYERS.values())} numbers, not {sizes}")
    return [weight.detach().reshape(1, -1, 1, 1) for weight in weights]


def load(file: WeightFile) -> Any:
    path = path_of(file)
    try:
        with open_regular(path) as stream:
            return torch_files.load(stream, os.path.getsize(path))
    except Exception as error:                                      # readers of archives and pickles raise many kinds
        reason = (str(error) or repr(error)).splitlines()[0]
        raise broken(file, f"{os.path.getsize(path)} bytes, {reason}") from None


def broken(file: WeightFile, reason: str) -> UserError:
    return UserError(
        f"the weights of the loss_norm 'lpips' in {path_of(file)} are truncated or not the expected file ({reason}). "
        f"Delete the file, so that it is downloaded again from {file.url}, or {OTHERWISE}."
    )
