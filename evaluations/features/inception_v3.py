"""Inception-v3 of 2015-12-05, the network behind published FIDs, in PyTorch.

Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567), as TensorFlow's
`classify_image_graph_def.pb` holds it. Names are those of that graph with dots for slashes, which OpenAI's and
NVIDIA's files use too. Unlike torchvision's Inception, average pools leave out padding, and the pool of the last block
takes maxima.

Shapes: N images, C channels, H and W height and width.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299                                                  # images are resized to this
CLASSES, FEATURES = 1008, 2048
SPATIAL_BLOCK, SPATIAL_CHANNELS = "mixed_6", 7              # sFID looks at the first channels of its first branch
EPS = 1e-3                                                  # of the normalisations


class InceptionOutput(NamedTuple):
    """The output of the network for N images."""

    pool: Tensor                                            # [N,2048]
    spatial: Tensor                                         # [N,17,17,7]
    logits: Tensor                                          # [N,1008], without the last layer's bias


class InceptionV3(nn.Module):
    """uint8 or float images [N,3,H,W] in 0..255 -> InceptionOutput. Fresh weights are zeros: load some."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(OrderedDict(
            conv=Conv(3, 32, 3, stride=2),
            conv_1=Conv(32, 32, 3),
            conv_2=Conv(32, 64, 3, padding=1),
            pool=nn.MaxPool2d(3, 2),
            conv_3=Conv(64, 80, 1),
            conv_4=Conv(80, 192, 3),
            pool_1=nn.MaxPool2d(3, 2),
            mixed=small_block(192, 32),
            mixed_1=small_block(256, 64),
            mixed_2=small_block(288, 64),
            mixed_3=Branches(
                conv=Conv(288, 384, 3, stride=2),
                tower=tower(Conv(288, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, stride=2)),
                pool=nn.MaxPool2d(3, 2),
            ),
            mixed_4=middle_block(128),
            mixed_5=middle_block(160),
            mixed_6=middle_block(160),
            mixed_7=middle_block(192),
            mixed_8=Branches(
                tower=tower(Conv(768, 192, 1), Conv(192, 320, 3, stride=2)),
                tower_1=tower(Conv(768, 192, 1), row(192, 192), column(192, 192), Conv(192, 192, 3, stride=2)),
                pool=nn.MaxPool2d(3, 2),
            ),
            mixed_9=LargeBlock(1280, average_pool()),
            mixed_10=LargeBlock(2048, nn.MaxPool2d(3, 1, padding=1)),
        ))
        self.output = nn.Linear(FEATURES, CLASSES)
        for weight in self.parameters():
            nn.init.zeros_(weight)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> InceptionOutput:
        """uint8 or float images [N,3,H,W] in 0..255, resized and scaled here."""
        x = (tf1_bilinear(images.float(), SIDE, SIDE) - 128) / 128
        spatial = x
        for name, layer in self.layers.named_children():
            x = layer(x)
            if name == SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        pool = x.mean((2, 3))
        return InceptionOutput(pool, spatial, pool @ self.output.weight.T)


def tf1_bilinear(images: Tensor, height: int, width: int) -> Tensor:
    """Resize float images [N,C,H,W] as TensorFlow 1 does: source = target * H / height, without half-pixel centres.

    Nothing is averaged when an image shrinks, and the lower and right neighbours of the last row and column are
    themselves.
    """
    left, right, weight = taps(images, images.shape[3], width)
    rows = images[..., left] + (images[..., right] - images[..., left]) * weight
    top, bottom, weight = taps(images, images.shape[2], height)
    return rows[:, :, top] + (rows[:, :, bottom] - rows[:, :, top]) * weight[:, None]


def taps(images: Tensor, size: int, target_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of the target's places its two neighbours in the source, and how far it lies towards the second."""
    place = th.arange(target_size, dtype=images.dtype, device=images.device) * (size / target_size)
    first = place.long()
    return first, (first + 1).clamp(max=size - 1), place - first


# --- parts ---------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """Convolution, normalisation by stored statistics, ReLU."""

    def __init__(
        self, channels_in: int, channels: int, size: int | tuple[int, int], stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.stride, self.padding = stride, padding
        shape = (size, size) if isinstance(size, int) else size
        self.weight = nn.Parameter(th.zeros(channels, channels_in, *shape))
        for name in ("beta", "mean", "var"):
            self.register_buffer(name, th.zeros(channels))
        self.beta: Tensor
        self.mean: Tensor
        self.var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,channels,H',W']."""
        x = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        return F.batch_norm(x, self.mean, self.var, bias=self.beta, eps=EPS).relu_()


class Branches(nn.Module):
    """Branches side by side, their channels joined."""

    def __init__(self, **branches: nn.Module):
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,sum of the branches' channels,H',W']."""
        return th.cat([branch(x) for branch in self.children()], 1)


class LargeBlock(nn.Module):
    """The blocks at 8x8, whose towers fork: [N,C,8,8] -> [N,2048,8,8]."""

    def __init__(self, channels_in: int, pool: nn.Module):
        super().__init__()
        self.conv = Conv(channels_in, 320, 1)
        self.tower_conv = Conv(channels_in, 384, 1)
        self.tower_mixed_conv = Conv(384, 384, (1, 3), padding=(0, 1))
        self.tower_mixed_conv_1 = Conv(384, 384, (3, 1), padding=(1, 0))
        self.tower_1_conv = Conv(channels_in, 448, 1)
        self.tower_1_conv_1 = Conv(448, 384, 3, padding=1)
        self.tower_1_mixed_conv = Conv(384, 384, (1, 3), padding=(0, 1))
        self.tower_1_mixed_conv_1 = Conv(384, 384, (3, 1), padding=(1, 0))
        self.pool = pool
        self.tower_2_conv = Conv(channels_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,8,8] -> [N,2048,8,8]."""
        forked = self.tower_conv(x)
        forked_1 = self.tower_1_conv_1(self.tower_1_conv(x))
        return th.cat([
            self.conv(x),
            self.tower_mixed_conv(forked), self.tower_mixed_conv_1(forked),
            self.tower_1_mixed_conv(forked_1), self.tower_1_mixed_conv_1(forked_1),
            self.tower_2_conv(self.pool(x)),
        ], 1)


def small_block(channels_in: int, pool_channels: int) -> Branches:
    """35x35."""
    return Branches(
        conv=Conv(channels_in, 64, 1),
        tower=tower(Conv(channels_in, 48, 1), Conv(48, 64, 5, padding=2)),
        tower_1=tower(Conv(channels_in, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, padding=1)),
        tower_2=tower(Conv(channels_in, pool_channels, 1), pool=average_pool()),
    )


def middle_block(width: int) -> Branches:
    """17x17; `width` channels inside the towers."""
    return Branches(
        conv=Conv(768, 192, 1),
        tower=tower(Conv(768, width, 1), row(width, width), column(width, 192)),
        tower_1=tower(
            Conv(768, width, 1), column(width, width), row(width, width), column(width, width), row(width, 192)
        ),
        tower_2=tower(Conv(768, 192, 1), pool=average_pool()),
    )


def tower(*convs: Conv, pool: nn.Module | None = None) -> nn.Sequential:
    """Convolutions one after the other, behind a pool if there is one."""
    names = ["conv", *(f"conv_{i}" for i in range(1, len(convs)))]
    return nn.Sequential(OrderedDict([*([("pool", pool)] if pool else []), *zip(names, convs)]))


def row(channels_in: int, channels: int) -> Conv:
    """A convolution of 1x7 that keeps the size."""
    return Conv(channels_in, channels, (1, 7), padding=(0, 3))


def column(channels_in: int, channels: int) -> Conv:
    """A convolution of 7x1 that keeps the size."""
    return Conv(channels_in, channels, (7, 1), padding=(3, 0))


def average_pool() -> nn.Module:
    """Averages over 3x3 that keep the size and leave the padding out."""
    return nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
