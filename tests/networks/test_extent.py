"""The least that a description's network holds is never more than what it holds, and not much less."""

import dataclasses

import pytest
import torch as th

from cm.errors import UserError
from cm.networks.build import NetworkConfig, build_network
from cm.networks.extent import demand_held, least_parameters
from support.weights import TINY

COMMON = {"arch": "unet", "augment_dim": 0, "channels": 3}
NETWORKS = {
    "tiny": {**COMMON, **TINY},
    "imagenet64": {**COMMON, "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "channel_mult": "",
                   "attention_resolutions": "32,16,8", "num_head_channels": 64, "class_cond": True, "num_classes": 1000,
                   "resblock_updown": True, "use_scale_shift_norm": True},
    "thin": {**COMMON, **TINY, "channel_mult": "1,1,1", "num_res_blocks": 4, "class_cond": False},
    "ddpmpp": {"arch": "ddpmpp", "image_size": 32, "num_channels": 128, "num_res_blocks": 4, "channel_mult": "2,2,2",
               "attention_resolutions": "16", "augment_dim": 9, "channels": 4, "class_cond": True, "num_classes": 10},
    "ncsnpp": {"arch": "ncsnpp", "image_size": 32, "num_channels": 64, "num_res_blocks": 2, "channel_mult": "1,2",
               "attention_resolutions": "16", "augment_dim": 0, "channels": 1, "class_cond": False, "num_classes": 0},
    "adm": {"arch": "adm", "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "channel_mult": "1,2,3,4",
            "attention_resolutions": "32,16,8", "augment_dim": 0, "class_cond": True, "num_classes": 1000},
    "edm2": {"arch": "edm2", "image_size": 64, "num_channels": 128, "num_res_blocks": 3, "channel_mult": "1,2,3,4",
             "attention_resolutions": "16,8", "augment_dim": 0, "class_cond": True, "num_classes": 1000, "channels": 4},
    "thin edm2": {"arch": "edm2", "image_size": 8, "num_channels": 512, "num_res_blocks": 1, "channel_mult": "0.015625",
                  "attention_resolutions": "8", "augment_dim": 0, "class_cond": False, "num_classes": 0,
                  "num_head_channels": 8},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_a_bound_and_no_loose_one(name):
    flags = NETWORKS[name]
    known = {field.name for field in dataclasses.fields(NetworkConfig)}
    with th.device("meta"):
        model = build_network(NetworkConfig(**{key: value for key, value in flags.items() if key in known}))
    held = sum(param.numel() for param in model.parameters())
    assert held / 8 < least_parameters(flags) <= held


def test_what_a_file_cannot_hold_is_refused():
    flags = {**COMMON, **TINY}
    demand_held(flags, 2 * least_parameters(flags), "x.pt")
    with pytest.raises(UserError, match="x.pt describes a network of at least .* bytes and holds"):
        demand_held(flags, 2 * least_parameters(flags) - 1, "x.pt")
    for change in ({"num_res_blocks": 10**8}, {"num_channels": 10**9}, {"num_classes": 10**15},
                   {"channel_mult": ",".join(["0.00001"] * 10**5)}, {"image_size": 10**6}, {"channels": 10**12}):
        with pytest.raises(UserError, match="x.pt describes a network"):
            demand_held({**flags, **change}, 4_000_000, "x.pt")


def test_nothing_is_known_of_a_network_of_another_kind():
    flags = {**COMMON, **TINY, "arch": "mixer"}
    demand_held(flags, 100, "x.pt")
    with pytest.raises(UserError, match="for images of side 1,000,000"):
        demand_held({**flags, "image_size": 10**6}, 100, "x.pt")
