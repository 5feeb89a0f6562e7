"""DhariwalUNet: the U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233) as Karras et al. 2022 (EDM, arXiv 2206.00364,
appendix C and table 7) train it on ImageNet-64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from cm.networks.edm.base import EDMNetwork
from cm.networks.edm.layers import BlockOptions, Conv, Init, group_norm
from cm.networks.fused_norm import norm_act
from cm.networks.layers import timestep_embedding

EPS = 1e-5


class DhariwalUNet(EDMNetwork):
    """UNet with residual resampling and scale-shift norm, under other parameter names.

    :param img_resolution, in_channels, label_dim, augment_dim: see EDMNetwork.
    :param out_channels: channels of the output.
    :param model_channels: base width; level l is int(channel_mult[l] * model_channels) wide.
    :param channel_mult_emb: width of the embedding over the base width.
    :param num_blocks: residual blocks per level (one more on the way up).
    :param attn_resolutions: sides of the images at which attention takes place.
    :param dropout: probability, inside the residual blocks.
    :param channels_per_head: width of an attention head.
    :param use_checkpoint: recompute activations in the backward pass, to save memory.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Collection[int] = (32, 16, 8),
        dropout: float = 0.10,
        channels_per_head: int = 64,
        use_checkpoint: bool = False,
    ) -> None:
        widths = [int(mult * model_channels) for mult in channel_mult]
        super().__init__(img_resolution, in_channels, label_dim, augment_dim, widths, attn_resolutions)
        self.model_channels = model_channels
        emb_channels = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        init_zero = Init("kaiming_uniform", weight=0.0)
        options = BlockOptions(
            emb_channels=emb_channels, dropout=dropout, adaptive_scale=True, skip_scale=1.0, resample_proj=False,
            taps=(1, 1), eps=EPS, num_heads=-1, num_head_channels=channels_per_head, init=init, init_zero=init_zero,
            init_attention=init, use_checkpoint=use_checkpoint,
        )
        self.map_augment = init_zero(nn.Linear(augment_dim, model_channels, bias=False)) if augment_dim else None
        self.map_layer0 = init(nn.Linear(model_channels, emb_channels))
        self.map_layer1 = init(nn.Linear(emb_channels, emb_channels))
        self.map_label = None
        if label_dim:
            init_label = Init("kaiming_normal", weight=math.sqrt(label_dim))
            self.map_label = init_label(nn.Linear(label_dim, emb_channels, bias=False))
        self.enc = self.encoder(widths[0], num_blocks, options)
        self.dec = self.decoder(num_blocks, options, attends_often=True)
        self.out_norm = group_norm(widths[0], EPS)
        self.out_conv = init_zero(Conv(widths[0], out_channels, 3))

    @property
    def last_conv(self) -> Conv:
        """The convolution that makes the image."""
        return self.out_conv

    def embed(self, noise_labels: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The conditioning of the blocks: [N], [N,K], [N,A] -> [N,E]."""
        emb = timestep_embedding(noise_labels, self.model_channels).to(self.map_layer0.weight.dtype)
        if augment_labels is not None and self.map_augment is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(self.act(self.map_layer0(emb)))
        if labels is not None and self.map_label is not None:
            emb = emb + self.map_label(labels.to(emb.dtype))
        return self.act(emb)

    def output(self, x: Tensor) -> Tensor:
        """The last layers: [N,C,H,W] -> [N,out_channels,H,W]."""
        return self.out_conv(norm_act(self.out_norm, x))
