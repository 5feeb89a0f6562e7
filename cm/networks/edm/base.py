"""The common part of the EDM networks: levels, forward pass, checks of inputs.

Shapes: N batch, C channels, H and W height and width, E embedding width, K classes, A augmentation labels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn

from cm.errors import UserError
from cm.networks.edm.layers import BlockOptions, Conv, ConvDown, UNetBlock
from cm.networks.held import Holds
from cm.networks.layers import SiLU, without_autocast
from cm.networks.modulation import Conditioning, JointModulation, can_join
from cm.networks.precision import HalfPrecisionTrunk
from cm.networks.second_time import SecondTime, check_gap


@dataclass(frozen=True)
class EDMConfig:
    """What the networks are built from, by EDM's names and in EDM's order.

    :param img_resolution: side of the images.
    :param in_channels, out_channels: channels of input and output.
    :param label_dim: number of classes, 0 for none.
    :param augment_dim: length of the augmentation labels, 0 for none.
    :param model_channels: base width; level l is int(channel_mult[l] * model_channels) wide.
    :param channel_mult: one multiplier per level; the image halves between levels.
    :param channel_mult_emb: width of the embedding over the base width.
    :param num_blocks: residual blocks per level (one more on the way up).
    :param attn_resolutions: sides of the images at which attention takes place; a side that no level has has no effect.
    :param dropout: probability, inside the residual blocks.
    :param dropout_resolutions: sides of the training images' levels whose blocks have dropout; empty: all.
    :param use_checkpoint: recompute activations in the backward pass, to save memory.
    :param null_class: the label label_dim stands for no class; its one-hot row is zero, as in EDM's label dropout.
    :param second_time: the network takes a second time, as flow maps do.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: Sequence[float] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Collection[int] = (16,)
    dropout: float = 0.10
    use_checkpoint: bool = field(default=False, kw_only=True)
    null_class: bool = field(default=False, kw_only=True)
    second_time: bool = field(default=False, kw_only=True)
    dropout_resolutions: Collection[int] = field(default=(), kw_only=True)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    @property
    def emb_channels(self) -> int:
        """Width of the embedding."""
        return self.model_channels * self.channel_mult_emb

    def dropout_at(self, side: int) -> float:
        """The probability in a block whose output has this side, for training images."""
        return self.dropout if not self.dropout_resolutions or side in self.dropout_resolutions else 0


class ConditionedNetwork(HalfPrecisionTrunk):
    """What the networks of this package are told beside the image, and which inputs they accept.

    :raises UserError: for images that cannot be halved often enough.
    """

    def __init__(self, config: EDMConfig) -> None:
        super().__init__()
        self.config = config
        self.img_resolution, self.in_channels = config.img_resolution, config.in_channels
        self.label_dim, self.augment_dim = config.label_dim, config.augment_dim
        self.second_time = SecondTime(config.model_channels, config.emb_channels) if config.second_time else None
        self.shrinkage = 2 ** (len(config.widths) - 1)
        self._check_side(config.img_resolution)

    def one_hot(self, y: Tensor | None, n: int) -> Tensor | None:
        """Class labels of n samples as rows: [N] or [N,K] -> [N,K]; None for a network without classes.

        :raises ValueError: for labels that do not fit the network.
        """
        if not self.label_dim:
            if y is not None:
                raise ValueError("the network is not class-conditional: call it without y, or build it with label_dim")
            return None
        if y is None:
            raise ValueError(f"the network is class-conditional: give y, one label below {self.label_dim} per sample")
        if len(y) != n or (y.ndim, *y.shape[1:]) not in ((1,), (2, self.label_dim)):
            raise ValueError(f"y has shape {tuple(y.shape)}: give one label below {self.label_dim}, or one row of as "
                             f"many numbers, for each of the {n} samples")
        if y.ndim == 2:
            return y.float()
        try:
            rows = F.one_hot(y, self.label_dim + self.config.null_class)
            return rows[:, : self.label_dim].float()
        except RuntimeError:
            raise ValueError(f"a label in y is not one of the {self.label_dim} classes, 0 to {self.label_dim - 1}: "
                             f"{y.tolist()}") from None

    def check_inputs(self, x: Tensor, augment_labels: Tensor | None) -> None:
        """:raises ValueError: unless images [N,C,H,W] and augmentation labels [N,A] fit the network."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, the network expects [N, {self.in_channels}, H, W]")
        for side in x.shape[2:]:
            self._check_side(side)
        if augment_labels is not None and augment_labels.shape != (len(x), self.augment_dim):
            raise ValueError(f"augment_labels have shape {tuple(augment_labels.shape)}, the network expects "
                             f"{(len(x), self.augment_dim)}; --augment_dim 9 makes a network for EDM's augmentation")

    def _check_side(self, side: int) -> None:
        if side < self.shrinkage or side % self.shrinkage:
            raise UserError(f"images of side {side} cannot be halved between the {len(self.config.widths)} levels of "
                            f"the network: use a multiple of {self.shrinkage}, or a channel_mult with fewer levels")


class EDMNetwork(ConditionedNetwork, Holds):
    """A U-Net with the parameter names of the published EDM weights: `enc` and `dec`, each named by its resolution.

    :raises UserError: for images that cannot be halved often enough.
    """

    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def __init__(self, config: EDMConfig) -> None:
        super().__init__(config)
        self.act = SiLU()

    # --- building ----------------------------------------------------------------------------------------------------

    def encoder(
        self, first: int, options: BlockOptions, residual: Callable[[int, int], ConvDown] | None = None
    ) -> nn.ModuleDict:
        """The layers of the way down.

        :param first: width of the first convolution.
        :param residual: makes the layer that adds the image to a lower level, from the widths of both.
        """
        layers = nn.ModuleDict()
        channels, image_channels = first, self.in_channels
        for level, width in enumerate(self.config.widths):
            side = self.img_resolution >> level
            options = replace(options, dropout=self.config.dropout_at(side))
            if level == 0:
                layers[f"{side}x{side}_conv"] = options.init(Conv(self.in_channels, first, 3))
            else:
                layers[f"{side}x{side}_down"] = UNetBlock(channels, channels, options, "down")
                if residual is not None:
                    layers[f"{side}x{side}_aux_residual"] = residual(image_channels, channels)
                    image_channels = channels
            for i in range(self.config.num_blocks):
                attention = side in self.config.attn_resolutions
                layers[f"{side}x{side}_block{i}"] = UNetBlock(channels, width, options, attention=attention)
                channels = width
        return layers

    def decoder(self, options: BlockOptions, attends_often: bool) -> nn.ModuleDict:
        """The layers of the way up from `enc`; attention in the last block of a level, or in all if `attends_often`."""
        skips = [layer.out_channels for layer in self.enc.values() if isinstance(layer, (Conv, UNetBlock))]
        channels = skips[-1]
        layers = nn.ModuleDict()
        for level, width in reversed(list(enumerate(self.config.widths))):
            side = self.img_resolution >> level
            options = replace(options, dropout=self.config.dropout_at(side))
            attends = side in self.config.attn_resolutions
            if level == len(self.config.widths) - 1:
                layers[f"{side}x{side}_in0"] = UNetBlock(channels, channels, options, attention=True)
                layers[f"{side}x{side}_in1"] = UNetBlock(channels, channels, options)
            else:
                layers[f"{side}x{side}_up"] = UNetBlock(channels, channels, options, "up")
            for i in range(self.config.num_blocks + 1):
                attention = attends and (attends_often or i == self.config.num_blocks)
                layers[f"{side}x{side}_block{i}"] = UNetBlock(
                    channels + skips.pop(), width, options, attention=attention
                )
                channels = width
        return layers

    def trunk(self) -> Iterable[nn.Module]:
        """All but the embeddings and the last layers."""
        return (layer for layer in (*self.enc.values(), *self.dec.values()) if layer is not self.last_conv)

    # --- computing ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, noise_labels: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The conditioning of the blocks: [N], [N,K], [N,A] -> [N,E]."""

    @abstractmethod
    def output(self, x: Tensor) -> Tensor:
        """The last layers: [N,C,H,W] -> [N,out_channels,H,W]"""

    @property
    @abstractmethod
    def last_conv(self) -> Conv:
        """The convolution that makes the image."""

    def to_hold(self) -> JointModulation | None:
        """The projections of the embedding, joined; None if one of them is not plain."""
        blocks = [module for module in self.modules() if isinstance(module, UNetBlock)]
        return JointModulation(blocks, nn.Identity()) if all(map(can_join, blocks)) else None

    def forward(
        self, x: Tensor, noise_labels: Tensor, y: Tensor | None = None, augment_labels: Tensor | None = None,
        gap: Tensor | None = None,
    ) -> Tensor:
        """Apply the network.

        :param x: [N,in_channels,H,W], where H and W can be halved between all levels.
        :param noise_labels: [N], such as ln(sigma) / 4.
        :param y: class labels, [N] int64 or one-hot [N,K], for a network with classes and no other; K, or a row of
            zeros, is the null class, where the network has one.
        :param augment_labels: [N,A]; without them the images count as not augmented.
        :param gap: [N], see `SecondTime`, for a network with a second time and no other.
        :return: [N,out_channels,H,W] in the dtype of x.
        :raises ValueError: if an input does not fit the network.
        """
        self.check_inputs(x, augment_labels)
        labels = self.one_hot(y, len(x))
        if augment_labels is None and self.augment_dim:             # with zeros, all parameters get gradients
            augment_labels = noise_labels.new_zeros(len(x), self.augment_dim)
        # Not under autocast, whose half precision would merge neighbouring noise levels.
        with without_autocast(x.device):
            embedding = self.embed(noise_labels, labels, augment_labels)
            check_gap(gap, self.second_time)
            if self.second_time is not None:
                embedding = embedding + self.second_time(gap, embedding)
        emb: Conditioning = embedding if self.held is None else self.held(embedding)
        h = x.to(self.dtype)
        skips, image = [], h
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                h = skips[-1] = image = (h + layer(image)) / math.sqrt(2)
                continue
            h = layer(h, emb) if isinstance(layer, UNetBlock) else layer(h)
            skips.append(h)
        for name, layer in self.dec.items():
            if isinstance(layer, UNetBlock):
                h = layer(th.cat([h, skips.pop()], dim=1) if "_block" in name else h, emb)
        with without_autocast(x.device):        # the cost is small, and the output is not rounded
            return self.output(h.to(self.last_conv.weight.dtype)).to(x.dtype)
