"""The networks of Karras et al. 2022 (EDM, arXiv 2206.00364), by their names in --arch.

The constructors have EDM's argument names; SONG holds the differences of the two variants of SongUNet.
"""

from __future__ import annotations

from functools import partial

from cm.networks.edm.base import EDMNetwork
from cm.networks.edm.dhariwal_unet import DhariwalUNet
from cm.networks.edm.song_unet import SongUNet

__all__ = ["EDM_NETWORKS", "SONG", "DhariwalUNet", "EDMNetwork", "SongUNet"]

SONG = {
    "ddpmpp": {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard",
               "resample_filter": (1, 1)},
    "ncsnpp": {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
               "resample_filter": (1, 3, 3, 1)},
}

EDM_NETWORKS = {name: partial(SongUNet, **options) for name, options in SONG.items()} | {"adm": DhariwalUNet}
