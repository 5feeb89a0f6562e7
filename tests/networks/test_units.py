"""Every network is made of residual blocks, which hold most of its parameters."""

import pytest
from torch import nn

from cm.networks.build import NetworkConfig, build_network
from cm.networks.units import residual_blocks


@pytest.mark.parametrize("arch", ["unet", "ddpmpp", "ncsnpp", "adm", "edm2"])
def test_blocks_hold_most_of_a_network_and_each_parameter_once(arch):
    model = build_network(NetworkConfig(16, 64, 2, "1,2", attention_resolutions="8", arch=arch, num_head_channels=32))
    blocks = residual_blocks(model)
    held = [param for block in blocks for param in block.parameters()]
    assert len(blocks) >= 9 and len(set(held)) == len(held)
    sizes = [sum(param.numel() for param in params) for params in (held, model.parameters())]
    assert 0.8 * sizes[1] < sizes[0] < sizes[1]


def test_a_network_of_other_layers_has_none():
    assert residual_blocks(nn.Sequential(nn.Linear(2, 2))) == []
