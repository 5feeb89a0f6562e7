"""SongUNet: DDPM++ and NCSN++ of Song et al. 2021 (arXiv 2011.13456), as Karras et al. 2022 (EDM, arXiv 2206.00364,
appendix C and table 7) train them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch as th
from torch import Tensor, nn

from cm.networks.edm.base import EDMNetwork
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


class SongUNet(EDMNetwork):
    """DDPM++ by default; NCSN++ has embedding_type fourier, channel_mult_noise 2, encoder_type residual and
    resample_filter 1,3,3,1.

    :param img_resolution, in_channels, label_dim, augment_dim: see EDMNetwork.
    :param out_channels: channels of the output.
    :param model_channels: base width; level l is int(channel_mult[l] * model_channels) wide.
    :param channel_mult_emb, channel_mult_noise: widths of the embedding and of its waves over the base width.
    :param num_blocks: residual blocks per level (one more on the way up).
    :param attn_resolutions: sides of the images at which attention, of one head, takes place.
    :param dropout: probability, inside the residual blocks.
    :param embedding_type: of the time, see EMBEDDINGS.
    :param encoder_type: see ENCODERS.
    :param resample_filter: weights of the resampling filter.
    :param use_checkpoint: recompute activations in the backward pass, to save memory.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Collection[int] = (16,),
        dropout: float = 0.10,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
        use_checkpoint: bool = False,
    ) -> None:
        widths = [int(mult * model_channels) for mult in channel_mult]
        super().__init__(img_resolution, in_channels, label_dim, augment_dim, widths, attn_resolutions)
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init, init_zero = Init("xavier_uniform"), Init("xavier_uniform", weight=1e-5)
        options = BlockOptions(
            emb_channels=emb_channels, dropout=dropout, adaptive_scale=False, skip_scale=math.sqrt(0.5),
            resample_proj=True, taps=resample_filter, eps=EPS, num_heads=1, num_head_channels=-1, init=init,
            init_zero=init_zero, init_attention=Init("xavier_uniform", weight=math.sqrt(0.2)),
            use_checkpoint=use_checkpoint,
        )

        def residual(image_channels: int, channels: int) -> ConvDown:
            return init(ConvDown(image_channels, channels, 3, resample_filter))

        self.map_noise = lookup(EMBEDDINGS, embedding_type, "embedding_type")(noise_channels)
        self.map_label = init(nn.Linear(label_dim, noise_channels)) if label_dim else None
        self.map_augment = init(nn.Linear(augment_dim, noise_channels, bias=False)) if augment_dim else None
        self.map_layer0 = init(nn.Linear(noise_channels, emb_channels))
        self.map_layer1 = init(nn.Linear(emb_channels, emb_channels))
        is_residual = lookup(ENCODERS, encoder_type, "encoder_type")
        self.enc = self.encoder(model_channels, num_blocks, options, residual if is_residual else None)
        self.dec = self.decoder(num_blocks, options, attends_often=False)
        full = f"{img_resolution}x{img_resolution}"
        self.dec[f"{full}_aux_norm"] = group_norm(widths[0], EPS)
        self.dec[f"{full}_aux_conv"] = init_zero(Conv(widths[0], out_channels, 3))

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
