"""The magnitude-preserving U-Net of Karras et al. 2023 (EDM2, arXiv 2312.02696), configuration G.

Names and shapes of parameters are those of the published weights. Shapes: N batch, C channels, H and W height and
width, E embedding width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn

from cm.errors import UserError
from cm.networks.attention import count_heads, qkv_attention
from cm.networks.edm.base import ConditionedNetwork, EDMConfig
from cm.networks.edm.magnitude import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize
from cm.networks.layers import checkpoint, dropout, without_autocast
from cm.networks.second_time import check_gap
from cm.tensors import append_dims

RESIDUAL_BALANCE = ATTENTION_BALANCE = 0.3                          # share of the second path in a sum
LABEL_BALANCE = CONCAT_BALANCE = 0.5
LARGEST = 256                                                       # activation; larger ones are clamped
LOGVAR_CHANNELS = 128


@dataclass(frozen=True)
class EDM2Config(EDMConfig):
    """EDMConfig with this network's defaults: size S.

    :param channels_per_head: width of an attention head.
    """

    model_channels: int = 192
    channel_mult: Sequence[float] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: Collection[int] = (16, 8)
    dropout: float = 0.0
    channels_per_head: int = field(default=64, kw_only=True)

    @property
    def emb_channels(self) -> int:
        """Width of the embedding: that of the widest level."""
        return max(self.widths)


class EDM2Block(nn.Module):
    """A residual block, then attention if asked for.

    In the encoder the main path is normalised to unit length in each pixel, in the decoder it is not.

    :param side: of its output, for training images.
    :param resample: "down", "up" or "": what happens to the resolution first.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: EDM2Config, side: int, is_encoder: bool,
        resample: str = "", attention: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels, self.config, self.is_encoder, self.resample = out_channels, config, is_encoder, resample
        self.dropout = config.dropout_at(side)
        self.num_heads = count_heads(out_channels, -1, config.channels_per_head) if attention else 0
        self.emb_gain = nn.Parameter(th.zeros([]))
        self.conv_res0 = MPConv(out_channels if is_encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(config.emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        if attention:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N,C,H,W], [N,E] -> [N,out_channels,H',W']"""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.config.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample:
            x = F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        if self.is_encoder:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), (1,))
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = mp_silu(y * append_dims(scale, y.ndim).to(y.dtype))
        y = self.conv_res1(dropout(y, self.dropout, self.training))
        if not self.is_encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, RESIDUAL_BALANCE)
        if self.num_heads:
            x = mp_sum(x, self._attend(x), ATTENTION_BALANCE)
        return x.clamp(-LARGEST, LARGEST)

    def _attend(self, x: Tensor) -> Tensor:
        """Cosine attention: queries, keys and values of each head have magnitude 1 in each pixel."""
        # The rows of published weights are q, k and v of each channel in turn, as in EDM's networks.
        weight = self.attn_qkv.effective().unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        qkv = self.attn_qkv.apply_weight(weight, x)
        heads = normalize(qkv.unflatten(1, (3 * self.num_heads, -1)), (2,))
        return self.attn_proj(qkv_attention(heads.flatten(1, 2), self.num_heads))


class EDM2UNet(nn.Module):
    """The network without preconditioning and uncertainty; `enc` and `dec` are named by resolution, as EDM's."""

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        width, label_dim = config.widths[0], config.label_dim
        self.config = config
        self.out_gain = nn.Parameter(th.zeros([]))
        self.emb_fourier = MPFourier(width)
        self.emb_noise = MPConv(width, config.emb_channels)
        self.emb_label = MPConv(label_dim, config.emb_channels) if label_dim else None
        self.enc = self._encoder()
        self.dec = self._decoder()
        self.out_conv = MPConv(width, config.out_channels, 3)

    def _encoder(self) -> nn.ModuleDict:
        config, layers, channels = self.config, nn.ModuleDict(), self.config.widths[0]
        for level, width in enumerate(config.widths):
            side = config.img_resolution >> level
            if level == 0:                                          # reads a channel of ones, too, for want of biases
                layers[f"{side}x{side}_conv"] = MPConv(config.in_channels + 1, width, 3)
            else:
                layers[f"{side}x{side}_down"] = EDM2Block(channels, channels, config, side, True, "down")
            for i in range(config.num_blocks):
                attention = side in config.attn_resolutions
                layers[f"{side}x{side}_block{i}"] = EDM2Block(channels, width, config, side, True, attention=attention)
                channels = width
        return layers

    def _decoder(self) -> nn.ModuleDict:
        config, layers, channels = self.config, nn.ModuleDict(), self.config.widths[-1]
        skips = [layer.out_channels for layer in self.enc.values() if isinstance(layer, (MPConv, EDM2Block))]
        for level, width in reversed(list(enumerate(config.widths))):
            side = config.img_resolution >> level
            if level == len(config.widths) - 1:
                layers[f"{side}x{side}_in0"] = EDM2Block(channels, channels, config, side, False, attention=True)
                layers[f"{side}x{side}_in1"] = EDM2Block(channels, channels, config, side, False)
            else:
                layers[f"{side}x{side}_up"] = EDM2Block(channels, channels, config, side, False, "up")
            for i in range(config.num_blocks + 1):
                attention = side in config.attn_resolutions
                layers[f"{side}x{side}_block{i}"] = EDM2Block(
                    channels + skips.pop(), width, config, side, False, attention=attention
                )
                channels = width
        return layers

    def embed(self, noise_labels: Tensor, labels: Tensor | None) -> Tensor:
        """[N], [N,K] -> [N,E], before the last SiLU; rows of zeros in the labels stand for no class."""
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if labels is not None and self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(labels.to(emb.dtype) * math.sqrt(labels.shape[1])), LABEL_BALANCE)
        return emb

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N,C,H,W], [N,E] -> [N,out_channels,H,W]"""
        x = th.cat([x, th.ones_like(x[:, :1])], dim=1)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, EDM2Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, skips.pop(), CONCAT_BALANCE) if "_block" in name else x, emb)
        with without_autocast(x.device):        # the cost is small, and the output is not rounded
            return self.out_conv(x.to(self.out_conv.weight.dtype), self.out_gain)


class EDM2Network(ConditionedNetwork):
    """EDM2's U-Net, and the uncertainty of its denoising by noise level.

    The parameters stay float32: in half precision the trunk computes with rounded copies of the normalised weights.

    :raises UserError: for augmentation labels, images that cannot be halved often enough, or heads that do not fit.
    """

    def __init__(self, config: EDM2Config) -> None:
        if config.augment_dim:
            raise UserError(f"--augment_dim {config.augment_dim}: the network of --arch edm2 takes no augmentation "
                            "labels; drop it, or choose another --arch")
        super().__init__(config)
        self.unet = EDM2UNet(config)
        self.logvar_fourier = MPFourier(LOGVAR_CHANNELS)
        self.logvar_linear = MPConv(LOGVAR_CHANNELS, 1)
        self.is_half = False

    # --- precision ---------------------------------------------------------------------------------------------------

    def trunk(self) -> Iterable[nn.Module]:
        """All but the uncertainty."""
        return [self.unet]

    @property
    def dtype(self) -> th.dtype:
        """In which the trunk computes: float16 after `convert_to_fp16`."""
        return th.float16 if self.is_half else super().dtype

    def convert_to_fp16(self) -> None:
        """Let the trunk compute in half precision."""
        self.is_half = True

    def convert_to_fp32(self) -> None:
        """Let the trunk compute in the precision of its parameters again."""
        self.is_half = False

    # --- computing ---------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, noise_labels: Tensor, y: Tensor | None = None, augment_labels: Tensor | None = None,
        gap: Tensor | None = None,
    ) -> Tensor:
        """Apply the network; arguments, result and errors are those of `EDMNetwork`.

        :param augment_labels: None.
        """
        self.check_inputs(x, augment_labels)
        labels = self.one_hot(y, len(x))
        with without_autocast(x.device):        # whose half precision would merge neighbouring noise levels
            emb = self.unet.embed(noise_labels, labels)
            check_gap(gap, self.second_time)
            if self.second_time is not None:
                emb = emb + self.second_time(gap, emb)
            emb = mp_silu(emb)
        out = self.unet(x.to(self.dtype), emb)
        if th.is_grad_enabled():                # ranks wait for each other's gradients of all parameters
            out = out + 0 * append_dims(self._log_variance(noise_labels), out.ndim)
        return out.to(x.dtype)

    def log_variance(self, noise_labels: Tensor) -> Tensor:
        """u(sigma) of equation 21, the logarithm of the expected loss at noise labels: [N] -> [N]."""
        return self._log_variance(noise_labels).clone()     # no view, which hooks on the result do not allow

    def _log_variance(self, noise_labels: Tensor) -> Tensor:
        with without_autocast(noise_labels.device):
            return self.logvar_linear(self.logvar_fourier(noise_labels))[:, 0]

    @th.no_grad()
    def constrain(self, params: Mapping[str, Tensor]) -> None:
        """Forced weight normalisation, equation 66: stored weights go back to magnitude 1 after every optimizer step.

        The function that the network computes stays the same up to EPS. Without this the weights would grow, and their
        effective learning rate fall.

        :param params: by their names here; changed in place.
        """
        for name, module in self.named_modules():
            if isinstance(module, MPConv):
                weight = params[f"{name}.weight"]
                weight.copy_(MPConv.force(weight))
