"""From a network to a denoiser: the noise levels of a run, the scalings around its network, its loss weights.

Sources: Karras et al. 2022 (EDM, arXiv 2206.00364); Song et al. 2023 (Consistency Models, arXiv 2303.01469).

Shapes: N batch, C channels, H and W height and width. Images are in [-1, 1]; noise levels are [N].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch as th
from torch import Tensor, nn
from torch.types import Device

from cm.diffusion.preconditioning import PRECONDS, BoundaryPrecond, ConsistencyPrecond, Precond
from cm.diffusion.schedules import karras_grid
from cm.diffusion.weightings import WEIGHTINGS, get_weightings
from cm.errors import UserError
from cm.registry import lookup
from cm.tensors import append_dims
from cm.types import Denoiser

Self = TypeVar("Self", bound="Diffusion")


@dataclass(eq=False)
class Diffusion:
    """Turns the output of a network into a denoised image.

    :param sigma_data: standard deviation of the data.
    :param rho: of the Karras grids that the losses draw their noise levels from.
    :param weight_schedule: name of a loss weight, see WEIGHTINGS.
    :param distillation: scale as a consistency function, D(x, sigma_min) = x; otherwise scale as `precond` says.
    :param loss_norm: name of the distance between two images, for the objectives that compare images.
    :param time_scale: the network is conditioned on time_scale ln(sigma) / 4: 1000 for UNet, 1 for the EDM
        networks. With a precond that counts steps it is the number of the step.
    :param precond: name of the scalings around the network, see PRECONDS. sigma_min and sigma_max
        are clipped to the noise levels that its networks were trained on.
    :raises UserError: for an unknown weight_schedule or precond, and unless 0 < sigma_min < sigma_max.
    """

    num_timesteps: ClassVar[int] = 40                               # levels of the schedule samplers that use a grid

    sigma_data: float = 0.5
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    rho: float = 7.0
    weight_schedule: str = "karras"
    distillation: bool = False
    loss_norm: str = "lpips"
    time_scale: float = 1000.0
    precond: str = "edm"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(f"noise levels need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        lookup(WEIGHTINGS, self.weight_schedule, "weight_schedule")
        self.plain: Precond = lookup(PRECONDS, self.precond, "precond")(self.sigma_data, self.sigma_min)
        lowest, highest = self.plain.levels
        self.sigma_min, self.sigma_max = max(self.sigma_min, lowest), min(self.sigma_max, highest)
        is_edm = self.precond == "edm"                              # its published boundary condition is another one
        self.boundary: Precond = (
            ConsistencyPrecond(self.sigma_data, self.sigma_min) if is_edm
            else BoundaryPrecond(self.plain, self.sigma_min)
        )
        self.scaling = self.boundary if self.distillation else self.plain
        if self.scaling.counts_steps:
            self.time_scale = 1.0

    # --- noise levels, weights, scalings: [N] -> [N] ----------------------------------------------------------------

    def get_snr(self, sigmas: Tensor) -> Tensor:
        """The signal-to-noise ratio, 1 / sigma^2."""
        return sigmas**-2

    def weight(self, sigmas: Tensor) -> Tensor:
        """The weight of the loss."""
        return get_weightings(self.weight_schedule, self.get_snr(sigmas), self.sigma_data)

    def noise_labels(self, sigmas: Tensor, dtype: th.dtype = th.float32) -> Tensor:
        """What the network is conditioned on at these levels, time_scale c_noise: [N].

        :param dtype: of the images; the labels have it too, but are float32 at least.
        """
        return (self.time_scale * self.scaling.c_noise(sigmas)).to(th.promote_types(dtype, th.float32))

    def noise_levels(self, n: int, device: Device = "cpu", dtype: th.dtype = th.float32) -> Tensor:
        """The Karras grid of n levels from sigma_max to sigma_min: [n]."""
        return karras_grid(n, self.sigma_min, self.sigma_max, self.rho, device, dtype)

    # --- the denoiser ----------------------------------------------------------------------------------------------

    def denoise(self, model: nn.Module, x_t: Tensor, sigmas: Tensor, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
        """(F, D): the network's output and the denoised image, both in the dtype of x_t, whatever the network's is.

        :param x_t: [N,C,H,W] at noise levels sigmas [N].
        :param model_kwargs: the conditioning of the network, such as class labels y [N].
        """
        c_skip, c_out, c_in = (append_dims(c, x_t.ndim) for c in self.scaling.scalings(sigmas))
        model_output = model(c_in * x_t, self.noise_labels(sigmas, x_t.dtype), **model_kwargs).to(x_t.dtype)
        return model_output, th.addcmul(c_skip * x_t, c_out, model_output)

    def bind(self, model: nn.Module) -> Denoiser:
        """The denoiser D of a network, as a function of x [N,C,H,W], sigma [N] and the conditioning."""

        def D(x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
            return self.denoise(model, x, sigma, **cond)[1]

        return D

    def as_teacher(self: Self) -> Self:
        """The same noise levels with the scalings of a diffusion model, which is what a teacher is."""
        return dataclasses.replace(self, distillation=False)
