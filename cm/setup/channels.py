"""The meaning of the channels of a run: 1 and 3 are grey and RGB pictures, any other number is latents.

Latents are the output of the encoder of a VAE. They have no bounds, mirror images or colours, and networks for
pictures, such as LPIPS or Inception, cannot be applied to them.
"""

from __future__ import annotations

from cm.config.flags import Settings
from cm.data.decode import MODES
from cm.errors import UserError

FOR_PICTURES = ("random_flip", "clip_denoised")
"""Flags that are on by default and only make sense for pictures."""


def are_pictures(channels: int) -> bool:
    """Whether images with this number of channels are pictures."""
    return channels in MODES


def apply_latent_defaults(settings: Settings) -> None:
    """Turn off flags that only make sense for pictures, unless they are given."""
    if are_pictures(settings.values["channels"]):
        return
    for name in FOR_PICTURES:
        if name in settings.values and not settings.is_given(name):
            settings.replace(**{name: False})


def demand_pictures(settings: Settings, what: str) -> None:
    """:raises UserError: unless the run is of pictures; `what` begins the message."""
    channels = settings.values["channels"]
    if not are_pictures(channels):
        raise UserError(f"{what} is for pictures, of 1 or 3 channels, but this run has latents of "
                        f"{channels} channels, whose samples go to an npz; --vae FOLDER decodes them to pictures")
