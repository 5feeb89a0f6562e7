"""openai/consistency_models' `cm.karras_diffusion`: the denoiser with its losses, the samplers and the edits.

A compatibility module: KarrasDenoiser is in `cm.objectives.karras_denoiser`, the solvers are in `cm.samplers`, and the
edits in `cm.generate.editing`.

Shapes: N batch, C channels, H and W height and width. Images are in [-1, 1]; noise levels are [N].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.types import Device

from cm.config.arguments import shared_fields, takes_fields
from cm.diffusion.schedules import get_sigmas_karras
from cm.diffusion.weightings import get_weightings
from cm.generate.editing import Colorize, Edit, Inpaint, SuperRes, constrained
from cm.objectives.karras_denoiser import KarrasDenoiser
from cm.random_util import DummyGenerator
from cm.samplers import Churn, integrate, make_sampler
from cm.samplers.functions import (
    get_ancestral_step,
    sample_dpm,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_midpoint_ancestral,
    sample_onestep,
    sample_progdist,
    stochastic_iterative_sampler,
    to_d,
)
from cm.samplers.sample import BindsNetworks, SampleOptions, sample
from cm.types import Denoiser, NoiseSource, Sampler

__all__ = [
    "KarrasDenoiser", "get_ancestral_step", "get_sigmas_karras", "get_weightings", "iterative_colorization",
    "iterative_inpainting", "iterative_superres", "karras_sample", "sample_dpm", "sample_euler",
    "sample_euler_ancestral", "sample_heun", "sample_midpoint_ancestral", "sample_onestep", "sample_progdist",
    "stochastic_iterative_sampler", "to_d",
]

LETTER = "S"                                                # which the original fills in
LETTER_SHARE = 0.9                                          # of the side of an image


@dataclass(frozen=True)
class KarrasSampleArguments:
    """openai/consistency_models' argument list of `karras_sample`; `sample`, `SampleOptions` and `Churn` explain it."""

    diffusion: BindsNetworks
    model: nn.Module
    shape: Sequence[int]
    steps: int
    clip_denoised: bool = SampleOptions.clip_denoised
    progress: bool = False
    callback: Callable[[dict[str, Any]], None] | None = None
    model_kwargs: Mapping[str, Any] | None = None
    device: Device = None
    sigma_min: float = SampleOptions.sigma_min
    sigma_max: float = SampleOptions.sigma_max
    rho: float = SampleOptions.rho
    sampler: str | Sampler = SampleOptions.sampler
    s_churn: float = Churn.s_churn
    s_tmin: float = Churn.s_tmin
    s_tmax: float = Churn.s_tmax
    s_noise: float = Churn.s_noise
    generator: NoiseSource | None = None
    ts: Sequence[int] | None = None


@takes_fields(KarrasSampleArguments)
def karras_sample(arguments: KarrasSampleArguments) -> Tensor:
    """Sample images [N,C,H,W] in [-1, 1] from noise; the arguments are those of `KarrasSampleArguments`.

    :raises UserError: as `sample`.
    """
    options = SampleOptions(churn=Churn(**shared_fields(Churn, arguments)), **shared_fields(SampleOptions, arguments))
    a = arguments
    return sample(
        a.diffusion, a.model, a.shape, options, model_kwargs=a.model_kwargs, generator=a.generator, device=a.device,
        progress=a.progress, callback=a.callback,
    ).images


# --- edits: they start from x [N,C,H,W], noise of level t_max, visit the levels ts of a Karras grid, and return the
# edited images and the kept part; distiller(x, sigma [N]) is the consistency function ---------------------------------


@th.no_grad()
def _replace_and_denoise(
    distiller: Denoiser, edit: Edit, x: Tensor, ts: Sequence[int], t_min: float, t_max: float, rho: float, steps: int,
    generator: NoiseSource | None,
) -> Tensor:
    sampler = make_sampler("multistep", {"ts": ts, "sigma_min": t_min})
    sigmas = sampler.grid(steps, t_min, t_max, rho)
    return integrate(sampler, constrained(distiller, edit), x, sigmas, generator or DummyGenerator())


def iterative_inpainting(
    distiller: Denoiser, images: Tensor, x: Tensor, ts: Sequence[int], t_min: float = 0.002, t_max: float = 80.0,
    rho: float = 7.0, steps: int = 40, generator: NoiseSource | None = None, *, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill in where the mask is 0, see `Inpaint`; the second value shows the known pixels on black.

    :param mask: 1 where a pixel is known; by default a large letter S is filled in.
    """
    edit = Inpaint(images.to(x), letter_mask(*x.shape[-2:]) if mask is None else mask)
    return _replace_and_denoise(distiller, edit, x, ts, t_min, t_max, rho, steps, generator), edit.known


def iterative_colorization(
    distiller: Denoiser, images: Tensor, x: Tensor, ts: Sequence[int], t_min: float = 0.002, t_max: float = 80.0,
    rho: float = 7.0, steps: int = 40, generator: NoiseSource | None = None,
) -> tuple[Tensor, Tensor]:
    """Color images of known brightness, see `Colorize`; the second value is the brightness component."""
    edit = Colorize(images.to(x))
    return _replace_and_denoise(distiller, edit, x, ts, t_min, t_max, rho, steps, generator), edit.kept


def iterative_superres(
    distiller: Denoiser, images: Tensor, x: Tensor, ts: Sequence[int], t_min: float = 0.002, t_max: float = 80.0,
    rho: float = 7.0, steps: int = 40, generator: NoiseSource | None = None, *, factor: int = 8,
) -> tuple[Tensor, Tensor]:
    """Super-resolution of images with known patch means, see `SuperRes`; the second value contains the means."""
    edit = SuperRes(images.to(x), factor)
    return _replace_and_denoise(distiller, edit, x, ts, t_min, t_max, rho, steps, generator), edit.kept


def letter_mask(height: int, width: int) -> Tensor:
    """A mask that is 0 in a large letter S in the middle of the image and 1 around it: [height,width].

    The font is PIL's own, so that the mask is the same on every machine (the original needs the font file of Arial).
    """
    picture = Image.new("L", (width, height), color=255)
    font = ImageFont.load_default(LETTER_SHARE * min(height, width))
    ImageDraw.Draw(picture).text((width / 2, height / 2), LETTER, fill=0, font=font, anchor="mm")
    return th.from_numpy((np.asarray(picture) > 127).astype(np.float32))
