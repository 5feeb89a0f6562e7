"""SongUNet: DDPM++ and NCSN++ of Song et al. 2021 (arXiv 2011.13456), as Karras et al. 2022 (EDM, arXiv 2206.00364,
appendix C and table 7) train them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch as th
from torch import Tensor, nn

from cm.networks.edm.base import EDMConfig, EDMNetwork
from cm.networks.edm.layers import BlockOptions, Conv, ConvDown, Init, group_norm
from cm.networks.fused_norm import norm_act
from cm.networks.layers import timestep_embedding
from cm.registry import lookup

EPS = 1e-6


class PositionalEmbedding(nn.Module):
    """Waves of geometrically spaced lengths, up to 10000: DDPM++ was designed for times 0 to 999."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, t: Tensor) -> Tensor:
        """[N] -> [N,channels], cosines first"""
        return timestep_embedding(t, self.channels, endpoint=True)


class FourierEmbedding(nn.Module):
    """Waves of random frequencies, which are part of the published weights."""

    freqs: Tensor                                                   # [channels/2]

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", th.randn(channels // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        """[N] -> [N,channels], cosines first"""
        angles = t[:, None].to(self.freqs.dtype) * (2 * math.pi * self.freqs)
        return th.cat([angles.cos(), angles.sin()], dim=1)


EMBEDDINGS = {"positional": PositionalEmbedding, "fourier": FourierEmbedding}
ENCODERS = {"standard": False, "residual": True}                    # whether the lower levels read the image, too


@dataclass(frozen=True)
class SongConfig(EDMConfig):
    """DDPM++ by default; NCSN++ has embedding_type fourier, channel_mult_noise 2, encoder_type residual and
    resample_filter 1,3,3,1.

    :param embedding_type: of the time, see EMBEDDINGS.
    :param channel_mult_noise: width of the waves that the embedding is made of over the base width.
    :param encoder_type: see ENCODERS.
    :param resample_filter: weights of the resampling filter.
    """

    embedding_type: str = field(default="positional", kw_only=True)
    channel_mult_noise: int = field(default=1, kw_only=True)
    encoder_type: str = field(default="standard", kw_only=True)
    resample_filter: Sequence[float] = field(default=(1, 1), kw_only=True)


class SongUNet(EDMNetwork):
    """DDPM++ or NCSN++, whose attention has one head.

    :raises UserError: for an embedding or encoder of no known type.
    """

    def __init__(self, config: SongConfig) -> None:
        super().__init__(config)
        label_dim, augment_dim, widths = config.label_dim, config.augment_dim, config.widths
        emb_channels, noise_channels = config.emb_channels, config.model_channels * config.channel_mult_noise
        init, init_zero = Init("xavier_uniform"), Init("xavier_uniform", weight=1e-5)
        options = BlockOptions(
            emb_channels=emb_channels, dropout=config.dropout, adaptive_scale=False, skip_scale=math.sqrt(0.5),
            resample_proj=True, taps=config.resample_filter, eps=EPS, num_heads=1, num_head_channels=-1, init=init,
            init_zero=init_zero, init_attention=Init("xavier_uniform", weight=math.sqrt(0.2)),
            use_checkpoint=config.use_checkpoint,
        )

        def residual(image_channels: int, channels: int) -> ConvDown:
            return init(ConvDown(image_channels, channels, 3, config.resample_filter))

        self.map_noise = lookup(EMBEDDINGS, config.embedding_type, "embedding_type")(noise_channels)
        self.map_label = init(nn.Linear(label_dim, noise_channels)) if label_dim else None
        self.map_augment = init(nn.Linear(augment_dim, noise_channels, bias=False)) if augment_dim else None
        self.map_layer0 = init(nn.Linear(noise_channels, emb_channels))
        self.map_layer1 = init(nn.Linear(emb_channels, emb_channels))
        is_residual = lookup(ENCODERS, config.encoder_type, "encoder_type")
        self.enc = self.encoder(config.model_channels, options, residual if is_residual else None)
        self.dec = self.decoder(options, attends_often=False)
        full = f"{self.img_resolution}x{self.img_resolution}"
        self.dec[f"{full}_aux_norm"] = group_norm(widths[0], EPS)
        self.dec[f"{full}_aux_conv"] = init_zero(Conv(widths[0], config.out_channels, 3))

    @property
    def last_conv(self) -> Conv:
        """The convolution that makes the image."""
        conv = self.dec[f"{self.img_resolution}x{self.img_resolution}_aux_conv"]
        assert isinstance(conv, Conv)
        return conv

    def embed(self, noise_labels: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The conditioning of the blocks: [N], [N,K], [N,A] -> [N,E]."""
        cosines, sines = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = th.cat([sines, cosines], dim=1).to(self.map_layer0.weight.dtype)
        if labels is not None and self.map_label is not None:
            emb = emb + self.map_label(labels.to(emb.dtype) * math.sqrt(self.label_dim))
        if augment_labels is not None and self.map_augment is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        return self.act(self.map_layer1(self.act(self.map_layer0(emb))))

    def output(self, x: Tensor) -> Tensor:
        """The last layers: [N,C,H,W] -> [N,out_channels,H,W]."""
        norm = self.dec[f"{self.img_resolution}x{self.img_resolution}_aux_norm"]
        assert isinstance(norm, nn.GroupNorm)
        return self.last_conv(norm_act(norm, x))
