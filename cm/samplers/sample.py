"""Sampling from a network: initial noise, a grid of noise levels, a solver, and the number of evaluations.

Shapes: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch as th
from torch import Tensor, nn
from torch.types import Device

from cm.diffusion.preconditioning import Precond
from cm.networks.held import weights_held
from cm.random_util import DummyGenerator
from cm.samplers import Churn, CountingDenoiser, integrate, make_sampler
from cm.tensors import clip_to_pixels
from cm.types import Denoiser, NoiseSource, Sampler


class BindsNetworks(Protocol):
    """The part of a diffusion that sampling needs: the noise levels of its networks, and the denoiser of a network."""

    @property
    def scaling(self) -> Precond:
        """The scalings around the network, which limit the noise levels."""
        ...

    def bind(self, model: nn.Module) -> Denoiser:
        """The denoiser of a network."""
        ...


@dataclass(frozen=True)
class SampleOptions:
    """How images are sampled.

    :param steps: number of steps; for multistep, the number of noise levels that `ts` indexes.
    :param sampler: a name in SAMPLERS, or a sampler with its options.
    :param ts: see `cm.samplers.multistep`; used only if `sampler` is the name multistep.
    :param sigma_min: lowest noise level of the grid, clipped to the levels of the network.
    :param sigma_max: highest noise level of the grid, clipped as well.
    :param rho: exponent of the grid.
    :param churn: noise that is added before the steps.
    :param clip_denoised: clamp every denoised image to [-1, 1].
    :param clip_result: clamp the result to [-1, 1]; False for latents, which have no such bounds.
    :param ends_at: the noise level at which a consistency function is the identity, if that is not sigma_min.
    """

    steps: int
    sampler: str | Sampler = "heun"
    ts: Sequence[int] | None = None
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: Churn = field(default_factory=Churn)
    clip_denoised: bool = True
    clip_result: bool = True
    ends_at: float | None = None

    def make_sampler(self) -> Sampler:
        """The sampler itself.

        :raises UserError: for a name that is not in SAMPLERS.
        """
        if isinstance(self.sampler, str):
            ends_at = self.sigma_min if self.ends_at is None else self.ends_at
            return make_sampler(self.sampler, {"ts": self.ts, "sigma_min": ends_at})
        return self.sampler


class SampleResult(NamedTuple):
    """Images and their cost."""

    images: Tensor                                                  # [N,C,H,W] in [-1, 1]
    evaluations: int                                                # of the network, per image (NFE)


@th.no_grad()
def sample(
    diffusion: BindsNetworks,
    model: nn.Module,
    shape: Sequence[int],
    options: SampleOptions,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    generator: NoiseSource | None = None,
    device: Device = None,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> SampleResult:
    """Sample images from noise.

    :param shape: (N, C, H, W).
    :param model_kwargs: the conditioning of the network, such as class labels {"y": [N]}.
    :param generator: the source of all noise; by default torch's global generator.
    :param device: where to sample; by default where the model is.
    :param callback: see `cm.samplers.integrate`.
    :raises UserError: for an unknown sampler, missing or wrong ts, or churn in a sampler that does not use it.
    :raises ValueError: for an impossible grid.
    """
    sampler = options.make_sampler()
    lowest, highest = diffusion.scaling.levels
    levels = max(options.sigma_min, lowest), min(options.sigma_max, highest)
    sigmas = diffusion.scaling.grid(sampler.grid(options.steps, *levels, options.rho))
    rng = DummyGenerator() if generator is None else generator
    D = CountingDenoiser(diffusion.bind(model))
    x = rng.randn(*shape, device=_device_of(model) if device is None else device) * sigmas[0].item()
    with weights_held(model):
        x = integrate(
            sampler,
            partial(D, **(model_kwargs or {})),
            x,
            sigmas,
            rng,
            churn=options.churn,
            clip_denoised=options.clip_denoised,
            progress=progress,
            callback=callback,
        )
    return SampleResult(clip_to_pixels(x) if options.clip_result else x, D.calls)


def _device_of(model: nn.Module) -> th.device:
    return next((param.device for param in model.parameters()), th.device("cpu"))
