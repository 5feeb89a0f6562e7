"""Latents in the flags of a run: their description in the data set or the checkpoint, and the VAE that decodes them."""

from __future__ import annotations

import torch as th

from cm.config.flags import Provenance, Settings
from cm.config.schema import DataConfig, VaeConfig
from cm.data import latents
from cm.data.image_source import ImageSource
from cm.data.latents import EDM2, RECORD
from cm.data.sources import may_hold_moments, open_everywhere
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.generate.vae import Decoder, check_vae, load_vae
from cm.logging import logger
from cm.setup.channels import are_pictures

DATA = "data_dir"


def take_latents(settings: Settings) -> None:
    """Take size, channels and record from a data set of latents; what was asked for must agree with them.

    The set stays open as `settings.sources["data_dir"]`.

    :raises UserError: if a flag or a checkpoint contradicts it, or there is no record.
    """
    if source := _open_moments(settings):
        shape = {"channels": source.channels // 2, "image_size": source.image_size}
        for name, value in shape.items():
            if settings.is_given(name) and settings.values[name] != value:
                raise UserError(
                    f"{settings.given[name]} asks for {name}={settings.values[name]}, but the latents of "
                    f"{source.data_dir} have {name}={value}; drop the flag or choose other data"
                )
        if are_pictures(shape["channels"]):
            raise UserError(f"{source.data_dir} has latents of {shape['channels']} channels, which cannot be "
                            "distinguished from images: this toolkit supports latents with any other number")
        settings.replace(**shape)
        _warn_of_unknown_scale(settings, source)
        given_by = str(settings.given.get(RECORD, f"--{RECORD}"))
        given = settings.values[RECORD]
        source.latents = latents.record_for(source.latents, given, shape["channels"], source.data_dir, given_by)
        settings.replace(**{RECORD: source.latents.text()})
        settings.sources[DATA] = source
    check_record(settings)


def _open_moments(settings: Settings) -> ImageSource | None:
    """The data, if they are latents of which mean and standard deviation are known."""
    values, data = settings.values, settings.section(DataConfig)
    if not data.data_dir or not dist.on_main(may_hold_moments, data.data_dir):
        return None
    source = open_everywhere(data.data_dir, values["image_size"], data.labels, values["channels"], latents=True)
    return source if source.holds_moments else None


def _warn_of_unknown_scale(settings: Settings, source: ImageSource) -> None:
    if not settings.values[RECORD] and settings.provenance("channels") == Provenance.CHECKPOINT:
        logger.warn(f"{settings.given['channels']} does not say how its latents were scaled: whether those of "
                    f"{source.data_dir} are scaled in the same way is not known")


def check_record(settings: Settings) -> None:
    """:raises UserError: if the record of the latents is none, or of other channels than the network's."""
    record, channels = latents.parse(settings.values[RECORD], f"--{RECORD}"), settings.values["channels"]
    if record and record.channels != channels:
        raise UserError(f"--{RECORD} is for latents of {record.channels} channels, but --channels is {channels}")


def load_decoder(settings: Settings, device: th.device | None = None) -> Decoder | None:
    """The decoder that --vae asks for, on a device, by default this rank's; None if it asks for none.

    :raises UserError: on every rank, if the network makes no latents or it is not known how they are scaled, or the
        folder holds no VAE, or another one than they were made with.
    """
    if not settings.values.get("vae"):
        return None
    config, channels = settings.section(VaeConfig), settings.values["channels"]
    if are_pictures(channels):
        raise UserError(f"--vae {config.vae}: this network makes pictures of {channels} channels, not latents; drop it")
    check_record(settings)
    record = latents.parse(config.latents, f"--{RECORD}")
    if record is None:
        raise UserError(f"--vae {config.vae}: how the latents of this network are scaled is not known; give --{RECORD} "
                        f"'{EDM2.text()}' with a number for each of its {channels} channels")
    vae = load_vae(config.vae, "vae", record.pixels, config.vae_batch_size, device)
    check_vae(vae.loaded, record, config.vae)
    if not record.sha256:
        logger.log(f"which VAE the latents were made with is not recorded: decoding them with {config.vae}")
    return Decoder(vae, record)
