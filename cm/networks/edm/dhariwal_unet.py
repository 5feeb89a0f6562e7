"""DhariwalUNet: the U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233) as Karras et al. 2022 (EDM, arXiv 2206.00364,
appendix C and table 7) train it on ImageNet-64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from cm.networks.edm.base import EDMConfig, EDMNetwork
from cm.networks.edm.layers import BlockOptions, Conv, Init, group_norm
from cm.networks.fused_norm import norm_act
from cm.networks.layers import timestep_embedding

EPS = 1e-5


@dataclass(frozen=True)
class DhariwalConfig(EDMConfig):
    """EDMConfig with this network's defaults.

    :param channels_per_head: width of an attention head.
    """

    model_channels: int = 192
    channel_mult: Sequence[float] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: Collection[int] = (32, 16, 8)
    channels_per_head: int = field(default=64, kw_only=True)


class DhariwalUNet(EDMNetwork):
    """UNet with residual resampling and scale-shift norm, under other parameter names."""

    def __init__(self, config: DhariwalConfig) -> None:
        super().__init__(config)
        label_dim, augment_dim, widths = config.label_dim, config.augment_dim, config.widths
        model_channels, emb_channels = config.model_channels, config.emb_channels
        init = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        init_zero = Init("kaiming_uniform", weight=0.0)
        options = BlockOptions(
            emb_channels=emb_channels, dropout=config.dropout, adaptive_scale=True, skip_scale=1.0, resample_proj=False,
            taps=(1, 1), eps=EPS, num_heads=-1, num_head_channels=config.channels_per_head, init=init,
            init_zero=init_zero, init_attention=init, use_checkpoint=config.use_checkpoint,
        )
        self.map_augment = init_zero(nn.Linear(augment_dim, model_channels, bias=False)) if augment_dim else None
        self.map_layer0 = init(nn.Linear(model_channels, emb_channels))
        self.map_layer1 = init(nn.Linear(emb_channels, emb_channels))
        self.map_label = None
        if label_dim:
            init_label = Init("kaiming_normal", weight=math.sqrt(label_dim))
            self.map_label = init_label(nn.Linear(label_dim, emb_channels, bias=False))
        self.enc = self.encoder(widths[0], options)
        self.dec = self.decoder(options, attends_often=True)
        self.out_norm = group_norm(widths[0], EPS)
        self.out_conv = init_zero(Conv(widths[0], config.out_channels, 3))

    @property
    def last_conv(self) -> Conv:
        """The convolution that makes the image."""
        return self.out_conv

    def embed(self, noise_labels: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The conditioning of the blocks: [N], [N,K], [N,A] -> [N,E]."""
        emb = timestep_embedding(noise_labels, self.config.model_channels).to(self.map_layer0.weight.dtype)
        if augment_labels is not None and self.map_augment is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(self.act(self.map_layer0(emb)))
        if labels is not None and self.map_label is not None:
            emb = emb + self.map_label(labels.to(emb.dtype))
        return self.act(emb)

    def output(self, x: Tensor) -> Tensor:
        """The last layers: [N,C,H,W] -> [N,out_channels,H,W]."""
        return self.out_conv(norm_act(self.out_norm, x))
