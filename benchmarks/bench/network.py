"""The networks that are timed, and what one pass of them costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch as th
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cm.networks.build import to_device
from cm.script_util import create_model


@dataclass(frozen=True)
class NetworkSpec:
    """A U-Net and the batch that it is timed with."""

    image_size: int
    num_channels: int
    channel_mult: str
    num_res_blocks: int
    num_head_channels: int
    attention_resolutions: str
    batch: int

    def build(self, device: th.device, dropout: float = 0.0) -> nn.Module:
        """The network, with weights as of one in training: at the start its last layers are zero."""
        th.manual_seed(0)
        model = create_model(
            self.image_size, self.num_channels, self.num_res_blocks, channel_mult=self.channel_mult,
            attention_resolutions=self.attention_resolutions, num_head_channels=self.num_head_channels,
            resblock_updown=True, use_scale_shift_norm=True, dropout=dropout,
        )
        for param in model.parameters():
            if not param.any():
                nn.init.normal_(param, std=0.02)
        return to_device(model, device)

    def images(self, device: th.device, batch: int | None = None) -> Tensor:
        """[N,3,H,W] in [-1, 1]."""
        generator = th.Generator().manual_seed(0)
        return th.rand(batch or self.batch, 3, self.image_size, self.image_size, generator=generator).to(device) * 2 - 1


SPECS = {
    "cpu": NetworkSpec(32, 64, "1,2,2", 2, 32, "16,8", 32),                     # 8.0 M parameters
    "cuda": NetworkSpec(64, 192, "1,2,3,4", 3, 64, "32,16,8", 32),              # ImageNet-64, 295.9 M parameters
}


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Floating-point operations of one forward pass on one image: products and sums of all matrix work."""
    one = images[:1]
    # The plain attention kernel, which consists of products that the counter knows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), th.no_grad():
        model(one, one.new_zeros(1))
    return counter.get_total_flops()
