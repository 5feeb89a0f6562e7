"""The residual blocks of a network: the units whose parameters are gathered together in a sharded network."""

from __future__ import annotations

from torch import nn

from cm.networks.attention import AttentionBlock
from cm.networks.edm.edm2 import EDM2Block
from cm.networks.edm.layers import UNetBlock
from cm.networks.unet_blocks import ResBlock

BLOCKS = (ResBlock, AttentionBlock, UNetBlock, EDM2Block)


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """Residual and attention blocks in the order of the network; none for a network of other layers."""
    return [module for module in model.modules() if isinstance(module, BLOCKS)]
