"""The abstract sampler: a grid of noise levels and a solver that steps from one level to the next.

Shapes: N batch, C channels, H and W height and width. x is an image at noise level sigma, x = x0 + sigma z.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.diffusion.schedules import append_zero, karras_grid
from cm.tensors import append_dims
from cm.types import Denoiser, NoiseSource, Result


@dataclass(frozen=True)
class Sampler(ABC):
    """One solver with its options, which are the fields of the dataclass; `integrate` owns the loop.

    A subclass must define `step`. The other members have the usual behaviour: a Karras grid that ends with 0, and a
    last step that returns the denoised image. It satisfies the protocol `cm.types.Sampler`.
    """

    order: ClassVar[float] = 1                                      # claimed; the tests measure it
    accepts_churn: ClassVar[bool] = True
    uses_rho: ClassVar[bool] = True                                 # whether the grid is a Karras grid
    uses_jvp: ClassVar[bool] = False                                # whether the denoiser is differentiated, forward
    uses_steps: ClassVar[bool] = True                               # whether the number of steps changes anything
    networks: ClassVar[tuple[Result, ...]] = ("denoiser", "flow_map")       # of what kinds it makes images

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """The noise levels of `steps` steps, float64 [steps+1]: a Karras grid, then 0.

        Karras et al. 2022 (EDM, arXiv 2206.00364), equation 5.
        """
        return append_zero(karras_grid(steps, sigma_min, sigma_max, rho))

    def at(self, sigma: Tensor) -> Sampler:
        """The sampler of the step that begins at a level, which is on the host: nobody waits for what it decides there.

        :param sigma: one number, in the dtype of the images.
        """
        return self

    @abstractmethod
    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """[N,C,H,W] at sigma [N] -> [N,C,H,W] at sigma_next [N], where sigma_next > 0."""

    def last_step(self, D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        """The step from sigma [N] to 0. Following the slope at sigma all the way gives the denoised image itself."""
        return D(x, sigma)


def lerp_to(denoised: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """The point that keeps a share [N] of the way from `denoised` to x: Euler's step when keep = sigma_next / sigma."""
    return th.lerp(denoised, x, append_dims(keep, x.ndim))
