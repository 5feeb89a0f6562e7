"""Zero-shot editing: Song et al. 2023 (Consistency Models, arXiv 2303.01469), algorithm 4.

An edit says where sampling starts and what every denoised image must agree with. `constrained` applies that to a
denoiser, so that every sampler can edit; the loop is `cm.samplers.integrate`.

Shapes: N batch, C channels, H and W height and width. Images are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import Tensor
from torch.types import Device

from cm.errors import UserError
from cm.samplers import Churn, integrate
from cm.tensors import append_dims, clip_to_pixels
from cm.types import Denoiser, NoiseSource, Sampler

LUMA = (0.2989, 0.5870, 0.1140)                                     # weights of red, green and blue in brightness


class Edit:
    """The base class of edits of images [N,C,H,W]: start from the images with added noise, and keep no part of them."""

    def __init__(self, images: Tensor):
        self.known = images                                         # [N,C,H,W], the images to start from and to show

    def levels(self, sigmas: Tensor) -> Tensor:
        """The noise levels that this edit visits, from those of a sampler's grid."""
        return sigmas

    def begin(self, sigma: float, rng: NoiseSource) -> Tensor:
        """The start of sampling: [N,C,H,W] at noise level sigma, the first of `levels`."""
        return self.known + sigma * rng.randn_like(self.known)

    def project(self, x0: Tensor) -> Tensor:
        """The images nearest to x0 [N,C,H,W] that agree with the known parts; a projection, so idempotent."""
        return x0


# --- constraints -----------------------------------------------------------------------------------------------------


class Constraint(Edit):
    """Keep a part of the images, and let the network fill in the rest.

    In the paper's letters, A is orthogonal and Omega marks the coordinates to fill in. Only the space that the kept
    coordinates span matters, so no A is needed: `part` is the orthogonal projection to that space.
    """

    def __init__(self, images: Tensor):
        self.kept = self.part(images)                               # [N,C,H,W]
        self.known = self.picture()

    def part(self, x: Tensor) -> Tensor:
        """The part of x [N,C,H,W] that is kept, as an orthogonal projection."""
        raise NotImplementedError

    def picture(self) -> Tensor:
        """The kept part as images."""
        return self.kept

    def project(self, x0: Tensor) -> Tensor:
        """x0 [N,C,H,W] with its own kept part replaced by that of the images."""
        return self.kept + (x0 - self.part(x0))


class Inpaint(Constraint):
    """Keep the pixels where the mask is 1; fill in those where it is 0.

    :param mask: 0 or 1, or boolean, of a shape that broadcasts to that of the images.
    :param blank: value of the pixels to fill in, in the images to start from and to show; -1 is black.
    :raises UserError: for a mask of another size or with other values.
    """

    def __init__(self, images: Tensor, mask: Tensor, blank: float = -1.0):
        fits = mask.ndim <= images.ndim and all(a in (1, b) for a, b in zip(mask.shape[::-1], images.shape[::-1]))
        if not fits:
            raise UserError(f"a mask of {list(mask.shape)} does not fit images of {list(images.shape)}")
        if not ((mask == 0) | (mask == 1)).all():
            raise UserError("a mask must hold 1 where a pixel is known and 0 where it is to be filled in, nothing else")
        self.mask, self.blank = mask.to(images), blank
        super().__init__(images)

    def part(self, x: Tensor) -> Tensor:
        """The known pixels of x [N,C,H,W], the others 0."""
        return x * self.mask

    def picture(self) -> Tensor:
        """The known pixels, the others blank."""
        return self.kept + self.blank * (1 - self.mask)


class Colorize(Constraint):
    """Keep the brightness of every pixel, and nothing of its colour: C is 3, red, green and blue."""

    def __init__(self, images: Tensor):
        luma = images.new_tensor(LUMA)
        self.direction = append_dims(luma / luma.norm(), 3)         # [3,1,1], a unit vector
        super().__init__(images)

    def part(self, x: Tensor) -> Tensor:
        """The brightness of x [N,C,H,W]."""
        return self.direction * (self.direction * x).sum(1, keepdim=True)

    def picture(self) -> Tensor:
        """The gray image of this brightness."""
        gray = (self.direction * self.kept).sum(1, keepdim=True) / self.direction.sum()
        return gray.expand_as(self.kept)


class SuperRes(Constraint):
    """Keep the mean of every square patch, in each channel.

    :param factor: side of a patch in pixels.
    :raises UserError: if the patches do not tile the images.
    """

    def __init__(self, images: Tensor, factor: int):
        check_factor(factor, images.shape[2:])
        self.factor = factor
        super().__init__(images)

    def part(self, x: Tensor) -> Tensor:
        """The patch means of x [N,C,H,W]."""
        return F.interpolate(F.avg_pool2d(x, self.factor), scale_factor=self.factor, mode="nearest")


def check_factor(factor: int, size: Sequence[int]) -> None:
    """:raises UserError: if patches of side `factor` do not tile images of size (H, W), or hold one pixel only."""
    if factor < 2 or any(side % factor for side in size):
        fitting = [f for f in range(2, min(size) + 1) if all(side % f == 0 for side in size)]
        raise UserError(
            f"superres_factor {factor} does not divide images of {'x'.join(map(str, size))} pixels into patches; "
            f"choose one of: {', '.join(map(str, fitting)) or '(none fits)'}"
        )


# --- edits without a constraint --------------------------------------------------------------------------------------


class Stroke(Edit):
    """Redraw images, such as coarse strokes, starting at a middle noise level: Meng et al. 2022 (SDEdit, 2108.01073).

    :param sigma: the noise level to start at; more noise keeps less of the strokes.
    """

    def __init__(self, images: Tensor, sigma: float):
        super().__init__(images)
        self.sigma = sigma

    def levels(self, sigmas: Tensor) -> Tensor:
        """`sigma`, and the levels of the grid below it."""
        return th.cat([sigmas.new_tensor([self.sigma]), sigmas[sigmas < self.sigma]])


class Denoise(Edit):
    """Denoise images that are already noisy, in one step.

    :param sigma: the standard deviation of their noise.
    """

    def __init__(self, images: Tensor, sigma: float):
        super().__init__(images)
        self.sigma = sigma

    def levels(self, sigmas: Tensor) -> Tensor:
        """`sigma`, then 0."""
        return sigmas.new_tensor([self.sigma, 0.0])

    def begin(self, sigma: float, rng: NoiseSource) -> Tensor:
        """The images themselves: they have their noise."""
        return self.known


class Interpolate(Edit):
    """Images between two samples: their noise is interpolated, see `Between`. Only the shape of `images` is used."""

    def __init__(self, images: Tensor):
        super().__init__(th.zeros_like(images))


@dataclass(frozen=True)
class Between:
    """A noise source between two others: its normal numbers are a spherical interpolation of theirs.

    Uniform numbers and integers are those of `start`, since interpolation would change their distribution.

    :param weight: [N], 0 at the start and 1 at the end.
    """

    start: NoiseSource
    end: NoiseSource
    weight: Tensor

    def randn(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Standard normal numbers of a shape [N, ...]."""
        start, end = (source.randn(*shape, dtype=dtype, device=device) for source in (self.start, self.end))
        return slerp(start, end, self.weight)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of x [N, ...]."""
        return self.randn(*x.shape, dtype=x.dtype, device=x.device)

    def rand(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Uniform numbers in [0, 1) of a shape [N, ...], those of `start`."""
        return self.start.rand(*shape, dtype=dtype, device=device)

    def randint(
        self, low: int, high: int, size: tuple[int, ...], dtype: th.dtype = th.long, device: Device = None
    ) -> Tensor:
        """Integers in low..high-1 of a shape [N, ...], those of `start`."""
        return self.start.randint(low, high, size, dtype=dtype, device=device)


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Spherical linear interpolation of samples [N,...], weight [N]: a at weight 0, b at weight 1.

    It is linear if the two have the same or opposite directions, since no arc is determined then.
    """
    w = weight.to(a.device, th.float64, non_blocking=True)
    cosine = F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double())
    angle = cosine.clamp(-1, 1).arccos()                            # [N]
    straight = angle.sin() < 1e-6
    sine = angle.sin().masked_fill(straight, 1.0)
    of_a = th.where(straight, 1 - w, ((1 - w) * angle).sin() / sine)
    of_b = th.where(straight, w, (w * angle).sin() / sine)
    return append_dims(of_a.to(a.dtype), a.ndim) * a + append_dims(of_b.to(a.dtype), a.ndim) * b


# --- running them ----------------------------------------------------------------------------------------------------

CONSTRAINTS = {"inpaint": Inpaint, "colorize": Colorize, "superres": SuperRes}
EDITS: dict[str, Callable[..., Edit]] = {
    **CONSTRAINTS, "stroke": Stroke, "interpolate": Interpolate, "denoise": Denoise,
}
"""--task -> the edit, made of images and the options of the task."""


def constrained(D: Denoiser, edit: Edit, clip: bool = True) -> Denoiser:
    """The denoiser, with every denoised image projected to agree with the kept parts.

    :param clip: clamp to [-1, 1] before the projection; afterwards, it could change the kept parts.
    """

    def denoise(x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        denoised = D(x, sigma, **cond)
        return edit.project(clip_to_pixels(denoised) if clip else denoised)

    return denoise


@th.no_grad()
def run_edit(
    D: Denoiser, edit: Edit, sampler: Sampler, sigmas: Tensor, rng: NoiseSource, *, churn: Churn | None = None,
    clip_denoised: bool = True,
) -> Tensor:
    """The edited images [N,C,H,W]; they agree with the kept parts after any last step of the sampler.

    :param sigmas: the grid of the sampler, see `Sampler.grid`.
    """
    levels = edit.levels(sigmas)
    x = edit.begin(levels[0].item(), rng)
    return edit.project(integrate(sampler, constrained(D, edit, clip_denoised), x, levels, rng, churn=churn))
