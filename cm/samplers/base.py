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
    """One solver with its options, which are the fields of the dataclass; `integrate` runs the loop.

    A subclass must define `step`. The other members have defaults: a Karras grid that ends with 0, and a
    last step that returns the denoised image. It satisfies the protocol `cm.types.Sampler`.
    """

    order: ClassVar[float] = 1                                      # claimed; the tests measure it
    accepts_churn: ClassVar[bool] = True
    uses_rho: ClassVar[bool] = True                                 # whether the grid is a Karras grid
    uses_jvp: ClassVar[bool] = False                                # whether it uses forward-mode derivatives of D
    uses_steps: ClassVar[bool] = True                               # whether the number of steps has an effect
    networks: ClassVar[tuple[Result, ...]] = ("denoiser", "flow_map")       # the kinds of networks that it can sample

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        """The noise levels of `steps` steps, float64 [steps+1]: a Karras grid, then 0.

        Karras et al. 2022 (EDM, arXiv 2206.00364), equation 5.
        """
        return append_zero(karras_grid(steps, sigma_min, sigma_max, rho))

    def at(self, sigma: Tensor) -> Sampler:
        """The sampler for the step that begins at this level. The level is on the CPU: no device sync.

        :param sigma: a scalar tensor, in the dtype of the images.
        """
        return self

    @abstractmethod
    def step(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, rng: NoiseSource) -> Tensor:
        """[N,C,H,W] at sigma [N] -> [N,C,H,W] at sigma_next [N], where sigma_next > 0."""

    def last_step(self, D: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        """The step from sigma [N] to 0. An Euler step to 0 gives the denoised image itself."""
        return D(x, sigma)


def lerp_to(denoised: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """denoised + keep (x - denoised), with keep [N]: Euler's step for keep = sigma_next / sigma."""
    return th.lerp(denoised, x, append_dims(keep, x.ndim))
