"""The networks of EDM (Karras et al. 2022, arXiv 2206.00364) and EDM2 (2023, arXiv 2312.02696), by their --arch.

Their configurations have EDM's argument names; SONG holds the differences of the two variants of SongUNet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cm.networks.edm.base import ConditionedNetwork, EDMConfig, EDMNetwork
from cm.networks.edm.dhariwal_unet import DhariwalConfig, DhariwalUNet
from cm.networks.edm.edm2 import EDM2Config, EDM2Network
from cm.networks.edm.song_unet import SongConfig, SongUNet
from cm.registry import Table

__all__ = [
    "EDM_NETWORKS", "SONG", "ConditionedNetwork", "DhariwalConfig", "DhariwalUNet", "EDM2Config", "EDM2Network",
    "EDMConfig", "EDMNetwork", "SongConfig", "SongUNet",
]

SONG = {
    "ddpmpp": {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard",
               "resample_filter": (1, 1)},
    "ncsnpp": {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
               "resample_filter": (1, 3, 3, 1)},
}


def _song(**fields: Any) -> SongUNet:
    return SongUNet(SongConfig(**fields))


def _dhariwal(**fields: Any) -> DhariwalUNet:
    return DhariwalUNet(DhariwalConfig(**fields))


def _edm2(**fields: Any) -> EDM2Network:
    return EDM2Network(EDM2Config(**fields))


EDM_NETWORKS: Table[Callable[..., ConditionedNetwork]] = Table("arch", {
    **{name: partial(_song, **options) for name, options in SONG.items()}, "adm": _dhariwal,
    "edm2": _edm2,
})
"""Functions that make a network from the fields of its configuration; `unet` of --arch is none of them."""
