"""Continuous-time consistency models: Lu and Song 2024 (sCM, arXiv 2410.11081), algorithm 1.

The limit of a consistency loss as r approaches t. It is not a subclass of `Consistency`: instead of a pair and a
distance, it has a normalised derivative along the path. It shares the path with consistency losses: a teacher's (sCD),
or that of the same noise (sCT).

On TrigFlow's clock, see `cm.diffusion.trigflow`; sigma_data is sd. Shapes: N batch, C channels, H and W height and
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch as th
from torch import Tensor

from cm.diffusion import trigflow
from cm.diffusion.denoiser import Diffusion
from cm.networks.layers import without_autocast
from cm.objectives import tangents
from cm.objectives.noise_bins import NoiseBinWeights
from cm.objectives.paths import PathObjective
from cm.random_util import SharedDropout
from cm.tensors import append_dims, mean_flat
from cm.types import Batch, LossTerms, Networks, NoiseSource


@dataclass
class SCM(PathObjective):
    """|F(x_t) - sg F(x_t) - g / (|g| + c)|^2 / (CHW) with the tangent g of `tangent`; ln sigma ~ N(p_mean, p_std^2).

    The published prior weight and weight network are omitted. The optimum of the weight network cancels the prior, and
    the tangent already has about the same size at all levels; `weights` does the same from past losses.

    :param c: number added to the size of the tangent.
    :param norm: the size of a tangent is "rms", its root mean square over a sample, or "norm", its L2 norm.
    :param warmup: number of steps over which the factor rho of the network's own derivative rises from 0 to 1.
    :param weights: loss weights by noise level, learnt from the past losses.
    """

    options: ClassVar[tuple[str, ...]] = (
        "pair_path", "p_mean", "p_std", "tangent_c", "tangent_norm", "tangent_warmup", "bin_weights",
    )
    result = "consistency_function"
    sampler = "onestep"

    p_mean: float = -1.0
    p_std: float = 1.4
    c: float = 0.1
    norm: str = "rms"
    warmup: int = 10_000
    weights: NoiseBinWeights | None = None

    @classmethod
    def from_flags(cls, diffusion: Diffusion, values: Mapping[str, Any]) -> SCM:
        tangents.check_flags(diffusion, values)
        weights = NoiseBinWeights(diffusion.sigma_min, diffusion.sigma_max) if values["bin_weights"] else None
        return cls(
            diffusion, cls.path_of(values), values["p_mean"], values["p_std"], values["tangent_c"],
            values["tangent_norm"], values["tangent_warmup"], weights,
        )

    def __call__(self, nets: Networks, batch: Batch, step: int, rng: NoiseSource) -> LossTerms:
        x0 = batch.images
        noise = rng.randn_like(x0)
        z = rng.randn(len(x0), dtype=th.float64, device=x0.device)
        sigma = (z * self.p_std + self.p_mean).exp().to(x0.dtype)
        x = x0 + noise * append_dims(sigma, x0.ndim)
        masks = SharedDropout(x0.device)
        g = self.tangent(nets, batch, noise, x, sigma, self.warmup_factor(step), masks)
        size = tangents.sample_norm(g, self.norm)
        with masks:
            denoised = nets.online(x, sigma, **batch.cond)
        # F - sg F: its value is exactly 0, also at small t, where F itself would be rounded; its gradient is that of F.
        sin = append_dims(trigflow.angle(sigma, self.diffusion.sigma_data).sin(), x.ndim)
        change = (denoised.detach() - denoised) / (self.diffusion.sigma_data * sin)
        mse = mean_flat((change - tangents.normalized(g, self.c, self.norm)).square())
        loss = mse if self.weights is None else mse * self.weights.weight(sigma)
        return LossTerms(loss, sigma, {"mse": mse, "tangent": size}, {"tangent_max": size})

    def warmup_factor(self, step: int) -> float:
        """The factor rho of the tangent, from 0 to 1."""
        return min(1.0, step / self.warmup) if self.warmup else 1.0

    @th.no_grad()
    def tangent(
        self, nets: Networks, batch: Batch, noise: Tensor, x: Tensor, sigma: Tensor, rho: float, masks: SharedDropout
    ) -> Tensor:
        """-cos^2 t (sd F - v) - rho (sin t cos t x_t + sd sin t cos t dF/dt), equation 6: cos t df/dt at rho = 1.

        v = dx_t/dt is the velocity of the path through the images x [N,C,H,W] at levels sigma [N].
        """
        sd, t = self.diffusion.sigma_data, append_dims(trigflow.angle(sigma, self.diffusion.sigma_data), x.ndim)
        cos, sin = t.cos(), t.sin()
        with without_autocast(x.device):
            data, direction = self.velocity_path.ends(nets, batch, noise, x, sigma)
            v = cos * sd * direction - sin * data
        x_t = cos * x
        # d/dt times sin t cos t is the derivative by ln sigma.
        F, change = tangents.derivative(
            trigflow.network_of(self.diffusion, nets.online_model, batch.cond),
            (x_t / sd, sigma.log()), (sin * cos * v / sd, th.ones_like(sigma)), masks,
        )
        return -(cos**2) * (sd * F - v) - rho * (sin * cos * x_t + sd * change)

    @property
    def history(self) -> NoiseBinWeights | None:
        return self.weights

    def logs(self, step: int) -> dict[str, float]:
        return {"tangent_warmth": self.warmup_factor(step)}


class SCD(SCM):
    """Along a teacher's ODE; the student starts from its weights."""

    usual_path = "teacher"
    defaults: ClassVar[Mapping[str, Any]] = {"p_mean": -1.0, "p_std": 1.4}


class SCT(SCM):
    """Along the noise that was added to the image; the student may start from a teacher's weights."""

    usual_path = "noise"
    defaults: ClassVar[Mapping[str, Any]] = {"p_mean": -1.0, "p_std": 1.4}
