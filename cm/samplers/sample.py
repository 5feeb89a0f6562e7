"""From a network to images: noise, a grid of noise levels, a solver, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch as th
from torch import Tensor, nn

from cm.diffusion.preconditioning import Precond
from cm.random_util import DummyGenerator
from cm.samplers import Churn, CountingDenoiser, integrate, make_sampler
from cm.types import Denoiser, NoiseSource, Sampler


class BindsNetworks(Protocol):
    """What sampling needs of a diffusion: the noise levels it knows, and the denoiser of a network."""

    @property
    def scaling(self) -> Precond: ...

    def bind(self, model: nn.Module) -> Denoiser: ...


class SampleResult(NamedTuple):
    images: Tensor                                                  # [N,C,H,W] in [-1, 1]
    evaluations: int                                                # of the network, per image (NFE)


@th.no_grad()
def sample(
    diffusion: BindsNetworks,
    model: nn.Module,
    shape: Sequence[int],
    steps: int,
    clip_denoised: bool = True,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: Any = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sampler: str | Sampler = "heun",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    generator: NoiseSource | None = None,
    ts: Sequence[int] | None = None,
) -> SampleResult:
    """Images from noise, and what they cost.

    :param shape: (N, C, H, W).
    :param steps: of the solver; for multistep the number of noise levels that `ts` points into.
    :param clip_denoised: clamp every denoised image on the way to [-1, 1]; the result is clamped always.
    :param callback: see `cm.samplers.integrate`.
    :param model_kwargs: what else the network takes, such as class labels {"y": [N]}.
    :param device: where to sample; by default where the model is.
    :param sampler: a name in SAMPLERS, or a sampler made with options of its own.
    :param s_churn, s_tmin, s_tmax, s_noise: see `cm.samplers.Churn`.
    :param generator: the source of all noise; by default torch's global generator.
    :param ts: multistep only, see `cm.samplers.multistep`.
    :raises ValueError: for an unknown sampler, an impossible grid, missing or meaningless ts, churn where it is unused.
    """
    if isinstance(sampler, str):
        sampler = make_sampler(sampler, {"ts": ts, "sigma_min": sigma_min})
    lowest, highest = diffusion.scaling.levels
    sigmas = diffusion.scaling.grid(sampler.grid(steps, max(sigma_min, lowest), min(sigma_max, highest), rho))
    generator = DummyGenerator() if generator is None else generator
    D = CountingDenoiser(diffusion.bind(model))
    x = integrate(
        sampler,
        partial(D, **(model_kwargs or {})),
        generator.randn(*shape, device=device_of(model) if device is None else device) * sigmas[0].item(),
        sigmas,
        generator,
        churn=Churn(s_churn, s_tmin, s_tmax, s_noise),
        clip_denoised=clip_denoised,
        progress=progress,
        callback=callback,
    )
    return SampleResult(x.clamp(-1, 1), D.calls)


def device_of(model: nn.Module) -> th.device:
    return next((param.device for param in model.parameters()), th.device("cpu"))
