"""Edits of pictures by a network of latents: a VAE encodes them, the sampler edits latents, and the VAE decodes.

Shapes: N batch, C channels, H and W height and width of latents; a latent covers f x f pixels.
"""

from __future__ import annotations

from collections.abc import Collection

import torch as th
import torch.nn.functional as F
from torch import Tensor

from cm.errors import UserError
from cm.generate.editing import Edit, Inpaint, Interpolate, Stroke, run_edit
from cm.generate.vae import Decoder
from cm.samplers import Churn
from cm.types import Denoiser, NoiseSource, Sampler

LATENT_TASKS = {"inpaint": Inpaint, "stroke": Stroke, "interpolate": Interpolate}
"""The tasks that can be done on latents. Brightness, patch means and pixel noise have no counterpart there, since a VAE
is not linear."""


def check_latent_task(task: str, tasks: Collection[str], flag: str) -> None:
    """:raises UserError: if a network of latents cannot do this task; the message begins with `flag`."""
    if task not in LATENT_TASKS:
        fitting = ", ".join(name for name in LATENT_TASKS if name in tasks)
        raise UserError(f"{flag} {task} is defined on pixels, and this network edits the latents of a VAE: choose one "
                        f"of: {fitting}; or use a model of images")


def known_latents(mask: Tensor, factor: int) -> Tensor:
    """The mask of latents, 1 (known) or 0, [...,H,W]: a latent is known if the mask [...,fH,fW] knows all its pixels.

    :raises UserError: if no latent is known.
    """
    flat = mask.float().reshape(-1, 1, *mask.shape[-2:])
    known = -F.max_pool2d(-flat, factor)
    if not known.any():
        raise UserError(f"the mask leaves no square of {factor}x{factor} pixels known, and each latent represents one: "
                        "mask fewer pixels")
    return known.reshape(*mask.shape[:-2], *known.shape[-2:])


def on_latents(edit: Edit, decoder: Decoder) -> Edit:
    """The edit of latents [N,C,H,W] that corresponds to an edit of pictures [N,3,fH,fW].

    Unknown pixels are encoded as mid-grey, so that the result does not depend on what was there.

    :raises UserError: if there is none, or no latent is known.
    """
    if isinstance(edit, Inpaint):
        mask = edit.mask.expand_as(edit.known).amin(1, keepdim=True)        # [N,1,fH,fW]
        return Inpaint(decoder.encode(edit.kept), known_latents(mask, decoder.factor), blank=0.0)   # the mean
    if isinstance(edit, Stroke):
        return Stroke(decoder.encode(edit.known), edit.sigma)
    if isinstance(edit, Interpolate):
        count, _, height, width = edit.known.shape
        shape = (count, decoder.record.channels, height // decoder.factor, width // decoder.factor)
        return Interpolate(edit.known.new_zeros(shape))
    raise UserError(f"{type(edit).__name__} is defined on pixels; latents take one of: {', '.join(LATENT_TASKS)}")


@th.no_grad()
def run_picture_edit(
    D: Denoiser, edit: Edit, decoder: Decoder | None, sampler: Sampler, sigmas: Tensor, rng: NoiseSource, *,
    churn: Churn | None = None, clip_denoised: bool = True,
) -> Tensor:
    """`cm.generate.editing.run_edit` for pictures; known pixels are kept exactly, also if latents are edited.

    :param decoder: decodes the latents that D denoises; None if D denoises pictures.
    """
    if decoder is None:
        return run_edit(D, edit, sampler, sigmas, rng, churn=churn, clip_denoised=clip_denoised)
    x = run_edit(D, on_latents(edit, decoder), sampler, sigmas, rng, churn=churn, clip_denoised=clip_denoised)
    return edit.project(decoder(x))
