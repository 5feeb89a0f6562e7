"""From resolved settings to a network, the diffusion around it, and the precision it runs in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch as th

from cm.config.flags import Settings
from cm.config.schema import DiffusionConfig, ModelConfig
from cm.errors import UserError
from cm.networks.build import Network, NetworkConfig, build_network, parse_resolutions
from cm.objectives.karras_denoiser import KarrasDenoiser


def create_diffusion(
    weight_schedule: str = "karras",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    distillation: bool = False,
    loss_norm: str = "lpips",
    precond: str = "edm",
    arch: str = "unet",
    time_scale: float = 0.0,
) -> KarrasDenoiser:
    """The denoiser around a network.

    :param distillation: chooses the boundary scalings of a consistency model.
    :param time_scale: the network is conditioned on time_scale ln(sigma) / 4; 0 for what its authors have, 1000 for
        --arch unet and 1 for EDM's networks.
    """
    return KarrasDenoiser(
        sigma_data=0.5, sigma_max=sigma_max, sigma_min=sigma_min, distillation=distillation,
        weight_schedule=weight_schedule, loss_norm=loss_norm, precond=precond,
        time_scale=time_scale or (1000.0 if arch == "unet" else 1.0),
    )


def model_from(settings: Settings, **changes: Any) -> Network:
    """The network of resolved settings, in float32; `changes` override single flags."""
    config: dict[str, Any] = dataclasses.asdict(settings.section(ModelConfig)) | {"use_fp16": False} | changes
    return build_network(NetworkConfig(**config))


def diffusion_from(settings: Settings, distillation: bool, loss_norm: str = "l2") -> KarrasDenoiser:
    config = dataclasses.asdict(settings.section(DiffusionConfig))
    return create_diffusion(**config, distillation=distillation, loss_norm=loss_norm, arch=settings.values["arch"])


def drop_unreachable_attention(settings: Settings) -> None:
    """The default attention resolutions, without those that halving an image of this size does not reach."""
    if "attention_resolutions" not in settings.given:
        sides = parse_resolutions(settings.values["attention_resolutions"])
        reached = {settings.values["image_size"] / 2**level for level in range(16)}
        fitting = [side for side in sides if side in reached]
        settings.replace(attention_resolutions=",".join(map(str, fitting)))


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


def parse_ts(ts: str) -> tuple[int, ...] | None:
    """'0,22,39' -> (0, 22, 39); None when empty."""
    if not ts:
        return None
    try:
        return tuple(int(word) for word in ts.split(","))
    except ValueError:
        raise UserError(f"--ts {ts!r} is not a list of indices such as 0,22,39") from None
