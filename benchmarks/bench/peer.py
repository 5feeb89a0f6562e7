"""The same network and weights as diffusers has them: UNet2DModel, where that package is installed."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch as th
from torch import Tensor, nn

from bench.network import NetworkSpec
from cm.checkpoints.formats import diffusers as diffusers_folder
from cm.io.torchvision_shim import import_torchvision
from cm.script_util import model_and_diffusion_defaults

MISSING = "diffusers is not installed"


class Peer(nn.Module):
    """UNet2DModel behind the call of this toolkit's networks."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.unet(x, timesteps).sample


def peer_of(spec: NetworkSpec) -> Callable[[th.device], nn.Module] | None:
    """What builds diffusers' network with the weights of `spec.build`; None without diffusers.

    Its tensors lie in memory as that package leaves them, channels first.
    """
    return partial(_build, spec) if importlib.util.find_spec("diffusers") is not None else None


def _build(spec: NetworkSpec, device: th.device) -> nn.Module:
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()                                # diffusers imports it, and would trip over it
    from diffusers import UNet2DModel

    shape = {name: value for name, value in asdict(spec).items() if name != "batch"}
    flags = model_and_diffusion_defaults() | shape | {
        "resblock_updown": True, "use_scale_shift_norm": True, "training_mode": "consistency_training",
    }
    with tempfile.TemporaryDirectory() as folder:
        diffusers_folder.write(folder, spec.build(th.device("cpu")).state_dict(), flags, 40)
        unet = UNet2DModel.from_pretrained(os.path.join(folder, "unet"), low_cpu_mem_usage=False)
    return Peer(unet.train()).to(device)
