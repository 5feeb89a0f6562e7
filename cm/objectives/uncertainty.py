"""Denoising weighted by its learned uncertainty: Karras et al. 2023 (EDM2, arXiv 2312.02696), equations 14 to 21.

Shapes: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from cm.diffusion.denoiser import Diffusion
from cm.diffusion.noise_sampling import LogNormalSampler, ScheduleSampler
from cm.errors import UserError
from cm.objectives.edm import EDM, edm_terms
from cm.types import Batch, LossTerms, Networks, NoiseSource

WITHOUT = ("unet", "ddpmpp", "ncsnpp", "adm")
"""Values of --arch: the networks that do not estimate their uncertainty."""


@runtime_checkable
class Uncertain(Protocol):
    """A network that also estimates the logarithm of its loss by noise level."""

    def log_variance(self, noise_labels: Tensor) -> Tensor:
        """u: [N] -> [N]."""
        ...


@dataclass
class Uncertainty(EDM):
    """exp(-u(sigma)) weight(sigma) mean(D(x0 + sigma z, sigma) - x0)^2 + u(sigma), ln sigma normal.

    u is a second output of the network. Its optimum is the logarithm of the expected weighted loss at sigma, so all
    noise levels have equal weight in the gradient.

    :param noise_labels: noise levels -> the noise labels of the network, [N] -> [N].
    """

    options: ClassVar[tuple[str, ...]] = ("noise_mean", "noise_std")

    noise_labels: Callable[[Tensor], Tensor] = lambda sigma: sigma.log() / 4

    @classmethod
    def from_flags(cls, diffusion: Diffusion, values: Mapping[str, Any]) -> Uncertainty:
        """:raises UserError: for a network without an estimate of its uncertainty, or another noise distribution."""
        if values["arch"] in WITHOUT:
            raise UserError(f"--objective uncertainty needs a network that estimates its uncertainty, and --arch "
                            f"{values['arch']} does not: choose --arch edm2, or --objective edm")
        name = values["schedule_sampler"]
        if name != "lognormal":
            raise UserError(f"--schedule_sampler {name}: --objective uncertainty draws ln sigma from a normal "
                            "distribution, see --noise_mean and --noise_std; drop the flag")
        return cls.of(diffusion, LogNormalSampler(), {name: values[name] for name in cls.options})

    @classmethod
    def of(cls, diffusion: Diffusion, noise_distribution: ScheduleSampler, options: Mapping[str, Any]) -> Uncertainty:
        """The objective with the loss weights and noise labels of a diffusion; the options set the distribution."""
        own = LogNormalSampler(options["noise_mean"], options["noise_std"])
        return cls(diffusion.weight, own, lambda sigma: diffusion.noise_labels(sigma, sigma.dtype))

    def terms(self, nets: Networks, batch: Batch, noise: Tensor, sigma: Tensor, rng: NoiseSource) -> LossTerms:
        terms = edm_terms(nets.online, batch.images, noise, sigma, self.weight, batch.cond)
        u = log_variance(nets.online_model, self.noise_labels(sigma))
        return LossTerms(terms.loss * (-u).exp() + u, sigma, {**terms.logs, "log_variance": u})


def log_variance(model: nn.Module, noise_labels: Tensor) -> Tensor:
    """u at noise labels: [N] -> [N].

    :raises UserError: for a network that has none.
    """
    if not isinstance(model, Uncertain):
        raise UserError(f"--objective uncertainty needs a network with a method log_variance, which "
                        f"{type(model).__name__} does not have: choose --arch edm2")
    return cast(Uncertain, model).log_variance(noise_labels)
