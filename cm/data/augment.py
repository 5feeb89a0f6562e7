"""Non-leaky augmentation: images are transformed, the network is conditioned on how, and samples show no transforms.

Source: Karras et al. 2022 (EDM, arXiv 2206.00364), appendix F.2 and table 6; the geometric part of the pipeline of
Karras et al. 2020 (arXiv 2006.06676, appendix B), as EDM's training runs for CIFAR-10, FFHQ and AFHQ use it.

Shapes: N batch, C channels, H and W height and width. Positions in an image are (x, y) in pixels from its
centre, to the right and down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch as th
import torch.nn.functional as F
from torch import Tensor
from torch.types import Device

from cm.data.mapped import Batches, mapped
from cm.random_util import SampleStreams
from cm.tensors import without_tf32
from cm.types import Batch, NoiseSource

AUGMENT_LABELS = 9                              # x flip, y flip, scale, rotation 2, stretch 2, translation 2
SCALE_STD = 0.2                                 # of log2 of an isotropic scale
STRETCH_STD = 0.2                               # of log2 of an anisotropic scale
STRETCH_TURNED = 0.5                            # probability that the axes of a stretch are turned
TRANSLATE_STD = 0.125                           # as a fraction of the image's side
CHUNK_NUMBERS = 2**25                           # largest intermediate of a warp, in numbers

# The low-pass filter of the wavelet sym6 (Daubechies, Ten Lectures on Wavelets, table 6.3): orthonormal to its own
# shifts by two, so that sampling up and down again changes nothing.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)
LEAD = 5                                        # tap of the filter that belongs to the pixel itself


@dataclass(frozen=True)
class Transforms:
    """The transform of each image, [N] float64 each on the CPU; all zeros change nothing."""

    x_flip: Tensor                              # 0 or 1
    y_flip: Tensor
    scale: Tensor                               # times 2^(0.2 scale)
    angle: Tensor                               # radians
    stretch: Tensor                             # times 2^(0.2 stretch) along an axis, and by as much less across it
    stretch_angle: Tensor                       # of that axis
    shift_x: Tensor                             # in eighths of the width
    shift_y: Tensor

    def labels(self) -> Tensor:
        """The conditioning of the network, continuous in the angles: float32 [N,9], zeros without a transform."""
        turned = self.stretch_angle
        columns = (
            self.x_flip, self.y_flip, self.scale, self.angle.cos() - 1, self.angle.sin(),
            self.stretch * turned.cos(), self.stretch * turned.sin(), self.shift_x, self.shift_y,
        )
        return th.stack(columns, dim=1).float()

    def is_warp(self) -> Tensor:
        """Whether each image needs more than a flip: bool [N]."""
        return (self.scale != 0) | (self.angle != 0) | (self.stretch != 0) | (self.shift_x != 0) | (self.shift_y != 0)

    def inverse(self, height: int, width: int) -> Tensor:
        """The map from positions in the result to positions in the image: float64 [N,2,3]."""
        def turn(angle: Tensor) -> Tensor:                          # [N,2,2]
            return th.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(-1, 2, 2)

        shrink = 2.0 ** (-SCALE_STD * self.scale)                   # 1 / s of table 6
        squeeze = 2.0 ** (-STRETCH_STD * self.stretch)
        along = th.diag_embed(th.stack([squeeze, 1 / squeeze], dim=1))
        linear = shrink[:, None, None] * turn(self.angle) @ turn(-self.stretch_angle) @ along @ turn(self.stretch_angle)
        size = th.tensor([width, height], dtype=th.float64)
        shift = th.stack([self.shift_x, self.shift_y], dim=1) * TRANSLATE_STD * size
        return th.cat([linear, -linear @ shift[:, :, None]], dim=2)


class AugmentPipe:
    """Transforms each image with probability p by each of: vertical flip, scale, rotation, stretch, translation.

    Half of the images are mirrored left to right, whatever p is (EDM's multiplier of 1e8); the labels include that.

    :param p: EDM's --augment, in (0, 1]: 0.12 for CIFAR-10, 0.15 for 64x64.
    :raises ValueError: if p is outside (0, 1].
    """

    def __init__(self, p: float):
        if not 0 < p <= 1:
            raise ValueError(f"the probability of an augmentation lies in (0, 1], got {p}")
        self.p = p

    def draw(self, rng: NoiseSource, count: int) -> Transforms:
        """Transforms of `count` images, each from its own row of the stream."""
        coins = rng.rand(count, 10, dtype=th.float64).unbind(1)
        normal = rng.randn(count, 4, dtype=th.float64).unbind(1)

        def sometimes(coin: Tensor, value: Tensor, p: float = self.p) -> Tensor:
            return th.where(coin < p, value, th.zeros_like(value))

        shifted = coins[9]
        return Transforms(
            x_flip=(coins[0] < 0.5).double(),
            y_flip=sometimes(coins[1], (coins[2] < 0.5).double()),
            scale=sometimes(coins[3], normal[0]),
            angle=sometimes(coins[4], math.pi * (2 * coins[5] - 1)),
            stretch=sometimes(coins[6], normal[1]),
            stretch_angle=sometimes(coins[7], math.pi * (2 * coins[8] - 1), STRETCH_TURNED),
            shift_x=sometimes(shifted, normal[2]),
            shift_y=sometimes(shifted, normal[3]),
        )

    def __call__(self, images: Tensor, rng: NoiseSource) -> tuple[Tensor, Tensor]:
        """Images [N,C,H,W] -> the images transformed, and their labels [N,9], on the same device."""
        transforms = self.draw(rng, len(images))
        return apply(images, transforms), transforms.labels().to(images.device)


def apply(images: Tensor, transforms: Transforms) -> Tensor:
    """[N,C,H,W] -> the images transformed. Flips are exact, and an image without a transform is unchanged."""
    images = _flip_some(_flip_some(images, transforms.x_flip, dim=3), transforms.y_flip, dim=2)
    rows = transforms.is_warp().nonzero()[:, 0]
    if not len(rows):
        return images
    inverse = transforms.inverse(*images.shape[2:])[rows]
    _, channels, height, width = images.shape
    chunk = max(1, CHUNK_NUMBERS // (channels * 36 * height * width))       # 3 times the side, sampled up by 2
    result = images.clone()
    for some, maps in zip(rows.split(chunk), inverse.split(chunk)):
        some = some.to(images.device)
        result[some] = _warp(images[some], maps.to(images.device))
    return result


def _flip_some(images: Tensor, which: Tensor, dim: int) -> Tensor:
    chosen = (which != 0).to(images.device)[:, None, None, None]
    return th.where(chosen, images.flip(dim), images)


def _warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Images seen through an affine map, without aliasing.

    The images are continued beyond their borders by reflection, for one more image on each side. The map is sampled
    bilinearly at twice the resolution, between an interpolation and a decimation by the filter sym6; a translation by
    an integer number of pixels is therefore exact up to rounding.

    :param images: [N,C,H,W].
    :param inverse: [N,2,3], position in the result -> position in the image.
    """
    (height, width), channels = images.shape[2:], images.shape[1]
    taps = th.tensor(SYM6, dtype=images.dtype, device=images.device).repeat(channels, 1, 1, 1)      # [C,1,1,12]
    wide = F.pad(images, (width - 1, width - 1, height - 1, height - 1), mode="reflect")
    wide = F.conv_transpose2d(wide, taps, stride=(1, 2), padding=(0, LEAD), groups=channels)
    wide = F.conv_transpose2d(wide, taps.mT, stride=(2, 1), padding=(LEAD, 0), groups=channels)

    # Upsampled pixel u lies at pixel u / 2. The decimation to W pixels reads u = -5 .. 2 W + 4.
    x, y = _half_steps(width, images.device), _half_steps(height, images.device)
    x, y = x.expand(len(y), -1), y[:, None].expand(-1, len(x))
    place = th.stack([x, y, th.ones_like(x)], dim=2).to(images.dtype) @ inverse.to(images.dtype)[:, None].mT
    margin = th.tensor([width - 1, height - 1], device=images.device)
    size = th.tensor([wide.shape[3], wide.shape[2]], device=images.device)
    u = 2 * place + 3 * margin                      # [N, rows, columns, (x, y)]: 2 (place + (W - 1) / 2 + W - 1)
    fine = F.grid_sample(wide, 2 * u / (size - 1) - 1, mode="bilinear", padding_mode="zeros", align_corners=True)

    fine = F.conv2d(fine, taps, stride=(1, 2), groups=channels)
    return F.conv2d(fine, taps.mT, stride=(2, 1), groups=channels)


def _half_steps(side: int, device: Device) -> Tensor:
    """The positions from the centre, half a pixel apart, that a decimation to `side` pixels reads: [2 side + 10]."""
    return (th.arange(-LEAD, 2 * side + len(SYM6) - LEAD - 2, device=device) - (side - 1)) / 2


@dataclass(frozen=True)
class AugmentBatch:
    """Transforms the images of a batch, on the device, and gives it `augment_labels` [N,9] for the network.

    The transform of a sample depends on (seed, position), so it is the same on any number of ranks.
    """

    pipe: AugmentPipe
    seed: int
    device: th.device

    def __call__(self, batch: Batch) -> Batch:
        rng = SampleStreams(self.seed, batch.positions, stream="augment")
        with without_tf32():                                # whose 10 bits are too few for a place in an image
            images, labels = self.pipe(batch.images.to(self.device, non_blocking=True), rng)
        return replace(batch, images=images, cond={**batch.cond, "augment_labels": labels})


def augmented(data: Batches, p: float, seed: int, device: th.device) -> Batches:
    """A version of `data` with images augmented, on the device, and `augment_labels` [N,9] for the network.

    The transform of a sample depends on (seed, position), so it is the same on any number of ranks. Reference images
    are not transformed.
    """
    return mapped(data, AugmentBatch(AugmentPipe(p), seed, device))
