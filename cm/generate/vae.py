"""A VAE between pictures and latents: encoding, decoding, and the pictures of sampled latents.

Shapes: N images, C channels, H and W height and width of latents; a latent covers f x f pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch as th
from torch import Tensor

from cm.checkpoints.formats import autoencoder_kl
from cm.checkpoints.formats.autoencoder_kl import LoadedVae
from cm.data.latents import RECORD, LatentRecord
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.networks.layers import without_autocast


@dataclass(frozen=True)
class Vae:
    """The two halves of a VAE, in float32 on a device.

    :param pixels: the range of its pixels, one of `cm.data.latents.PIXELS`.
    :param batch_size: images at once; the memory grows with it.
    """

    loaded: LoadedVae
    pixels: str
    batch_size: int

    @property
    def device(self) -> th.device:
        """The device of the VAE."""
        return next(self.loaded.model.parameters()).device

    @th.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images [N,3,fH,fW] in [-1, 1] -> means and standard deviations [N,2C,H,W] on the device."""
        parts = []
        with without_autocast(self.device):
            for part in images.split(self.batch_size):
                pixels = part.to(self.device, th.float32)
                if self.pixels == "unit":
                    pixels = (pixels + 1) / 2
                found = self._model.encode(pixels).latent_dist
                parts.append(th.cat([found.mean, found.std], dim=1))
        return th.cat(parts)

    @th.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Raw latents [N,C,H,W] -> images [N,3,fH,fW] on the device, in about [-1, 1]."""
        parts = []
        with without_autocast(self.device):
            for part in z.split(self.batch_size):
                pixels = self._model.decode(part.to(self.device, th.float32)).sample
                parts.append(2 * pixels - 1 if self.pixels == "unit" else pixels)
        return th.cat(parts)

    @property
    def _model(self) -> Any:
        return cast(Any, self.loaded.model)


@dataclass(frozen=True)
class Decoder:
    """Decodes the latents of a network to pictures, and encodes pictures to such latents.

    :param record: how the latents of the network are scaled.
    """

    vae: Vae
    record: LatentRecord

    channels = 3

    @property
    def factor(self) -> int:
        """The number of pixels per latent on a side, f."""
        return self.vae.loaded.factor

    def side(self, latent_side: int) -> int:
        """The side of a picture, in pixels."""
        return self.factor * latent_side

    def identity(self) -> dict[str, str]:
        """The VAE and the scale of the latents, for a record of how a picture was made."""
        return {"vae": self.vae.loaded.sha256, RECORD: self.record.text()}

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [N,3,fH,fW] in [-1, 1] -> latents [N,C,H,W] in the scale of the network: means, without noise."""
        return self.record.normalised(self.vae.encode(images)[:, : self.record.channels])

    def __call__(self, x: Tensor) -> Tensor:
        """Samples [N,C,H,W] of a network -> pictures [N,3,fH,fW], in about [-1, 1]."""
        return self.vae.decode(self.record.raw(x.float()))


def load_vae(folder: str, flag: str, pixels: str, batch_size: int, device: th.device | None = None) -> Vae:
    """Load the VAE of a folder to a device, by default that of this rank.

    :param flag: the flag with the folder, for messages.
    :raises UserError: on every rank, for the reasons of `autoencoder_kl.read`.
    """
    loaded = autoencoder_kl.read(folder, flag)
    loaded.model.to(dist.dev() if device is None else device)
    return Vae(loaded, pixels, batch_size)


def check_vae(loaded: LoadedVae, record: LatentRecord, folder: str) -> None:
    """:raises UserError: if latents of this record were made by another VAE."""
    if loaded.channels != record.channels:
        raise UserError(f"--vae {folder} makes latents of {loaded.channels} channels, and those of the network have "
                        f"{record.channels}: give the VAE that they were made with, {record.about_vae()}")
    if record.sha256 and record.sha256 != loaded.sha256:
        raise UserError(f"--vae {folder} is not the VAE that the latents of the network were made with: its weights "
                        f"have SHA-256 {loaded.sha256[:12]}..., and the record is of {record.about_vae()}")
