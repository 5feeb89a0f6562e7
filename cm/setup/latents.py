"""Latents in the flags of a run: what the data set or the checkpoint says of them, and the VAE that decodes them."""

from __future__ import annotations

from cm.config.flags import Provenance, Settings
from cm.config.schema import DataConfig
from cm.data import latents
from cm.data.image_source import ImageSource
from cm.data.latents import RECORD
from cm.data.sources import may_hold_moments, open_source
from cm.errors import UserError
from cm.logging import logger

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
        settings.replace(**shape)
        _warn_of_unknown_scale(settings, source)
        given_by = str(settings.given.get(RECORD, f"--{RECORD}"))
        given = settings.values[RECORD]
        record = latents.record_for(source.latents, given, shape["channels"], source.data_dir, given_by)
        settings.replace(**{RECORD: record.text()})
        settings.sources[DATA] = source
    check_record(settings)


def _open_moments(settings: Settings) -> ImageSource | None:
    """The data, if they are latents of which mean and standard deviation are known."""
    values, data = settings.values, settings.section(DataConfig)
    if not data.data_dir or not may_hold_moments(data.data_dir):
        return None
    source = open_source(
        data.data_dir, values["image_size"], labels=data.labels, channels=values["channels"], latents=True
    )
    return source if source.holds_moments else None


def _warn_of_unknown_scale(settings: Settings, source: ImageSource) -> None:
    if not settings.values[RECORD] and settings.provenance("channels") == Provenance.CHECKPOINT:
        logger.warn(f"{settings.given['channels']} does not say how its latents were scaled: whether those of "
                    f"{source.data_dir} are scaled in the same way is not known")


def check_record(settings: Settings) -> None:
    """:raises UserError: if the record of the latents is none, or of other channels than the network's."""
    record, channels = latents.parse(settings.values[RECORD], f"--{RECORD}"), settings.values["channels"]
    if record and record.channels != channels:
        raise UserError(f"--{RECORD} is of latents of {record.channels} channels, and --channels is {channels}")
