"""Sequence-aware loss: Nguyen, Vu, Nguyen Thanh, Than and Tran, AAAI 2024 (SA-DPM, arXiv 2312.12431), equation 11.

The error of a sampler is the sum of the errors along its path, so the loss penalises sums over neighbouring levels too.

Shapes: N batch, C channels, H and W height and width. Times are noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch as th
from torch import Tensor

from cm.diffusion import ddpm_schedule
from cm.diffusion.denoiser import Diffusion
from cm.diffusion.noise_sampling import ScheduleSampler
from cm.diffusion.schedules import karras_earlier
from cm.errors import UserError
from cm.objectives.edm import EDM
from cm.tensors import append_dims, mean_flat
from cm.types import Batch, LossTerms, Networks, NoiseSource

Earlier = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass
class SADPM(EDM):
    """mean(r_0)^2 + sa_lambda / K^2 mean(sum_k r_k)^2, where r_k = sqrt(weight(s_k)) (D(x0 + s_k z_k, s_k) - x0).

    s_0 is drawn; s_1 .. s_K-1 are the levels below it, if they exist; the z_k are independent. With the weight
    1 / sigma^2, r_k is the error of the predicted noise. On DDPM's levels, sa_lambda 0 gives DDPM's loss.

    :param num_consecutive_steps: K; 0 stands for 1, as in the authors' commands for DDPM's loss.
    :param earlier: (levels [N], k) -> the levels k steps closer to the image [N], and whether they exist [N].
    """

    defaults: ClassVar[Mapping[str, Any]] = {"precond": "ddpm"}
    options: ClassVar[tuple[str, ...]] = ("num_consecutive_steps", "sa_lambda")

    num_consecutive_steps: int = 2
    sa_lambda: float = 0.2
    earlier: Earlier = ddpm_schedule.earlier

    @classmethod
    def of(cls, diffusion: Diffusion, noise_distribution: ScheduleSampler, options: Mapping[str, Any]) -> SADPM:
        """The objective on DDPM's timesteps if the network is conditioned on them, else on a Karras grid of 1000."""
        weight = options.get("sa_lambda", cls.sa_lambda)
        if options.get("num_consecutive_steps", cls.num_consecutive_steps) == 0 and weight:
            raise UserError("--num_consecutive_steps 0 leaves nothing to sum, but --sa_lambda "
                            f"{weight:g} weighs the sum: give 2 or more steps, or --sa_lambda 0")
        ends = {"sigma_min": diffusion.sigma_min, "sigma_max": diffusion.sigma_max, "rho": diffusion.rho}
        on_grid = partial(karras_earlier, n=ddpm_schedule.TIMESTEPS, **ends)
        earlier = ddpm_schedule.earlier if diffusion.precond == "ddpm" else on_grid
        return cls(diffusion.weight, noise_distribution, earlier=earlier, **options)

    def terms(self, nets: Networks, batch: Batch, noise: Tensor, sigma: Tensor, rng: NoiseSource) -> LossTerms:
        x0, K = batch.images, max(1, self.num_consecutive_steps)
        levels = [self.earlier(sigma, k) for k in range(K)]
        errors, residuals, total = [], [], th.zeros_like(x0)
        for k, (s, is_there) in enumerate(levels):
            z = noise if k == 0 else rng.randn_like(x0)
            error = nets.online(x0 + z * append_dims(s, x0.ndim), s, **batch.cond) - x0
            residual = error * append_dims(self.weight(s).sqrt(), x0.ndim)
            total = th.where(append_dims(is_there, x0.ndim), total + residual, total)
            errors.append(error)
            residuals.append(residual)
        xs_mse, mse = mean_flat(errors[0].square()), mean_flat(residuals[0].square())
        sequence = mean_flat(total.square()) / K**2
        loss = mse + self.sa_lambda * sequence
        return LossTerms(loss, levels[0][0], {"xs_mse": xs_mse, "mse": mse, "sequence": sequence})
