"""Sampling: the toolkit's samplers beside the plain way, same network, same noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch as th
from torch import nn

from bench.baseline import plain_copy, plain_heun, plain_one_step
from bench.ceiling import Ceiling
from bench.contestants import Job, take_turns_apart
from bench.lines import Line, speed_line
from bench.network import NetworkSpec, forward_flops
from bench.peer import MISSING, peer_of
from cm.generate.engine import at_precision
from cm.karras_diffusion import KarrasDenoiser
from cm.random_util import get_generator
from cm.samplers.sample import SampleOptions, sample

HEUN_STEPS = 5
STEPS = {"onestep": 1, "heun": HEUN_STEPS}


def sample_suite(spec: NetworkSpec, device: th.device, ceiling: Ceiling, repeats: int) -> list[Line]:
    """One step and a few steps of Heun's method, in fp32 and bf16, beside plain fp32."""
    per_image = forward_flops(spec.build(device), spec.images(device))
    peer = peer_of(spec)
    ways = {"toolkit": spec.build} | ({} if peer is None else {"diffusers' network": peer})
    lines = []
    for sampler, steps in STEPS.items():
        makers: dict[str, Callable[[], Job]] = {"plain fp32": partial(plain_job, spec, device, sampler)}
        for (way, build), dtype in itertools.product(ways.items(), ("fp32", "bf16")):
            makers[f"{way} {dtype}"] = partial(toolkit_job, build, spec, device, sampler, dtype)
        times = take_turns_apart(makers, device, repeats, plain=["plain fp32"])
        evaluations = 2 * steps - 1
        for name, each in times.items():
            flops = per_image * spec.batch * evaluations
            lines.append(speed_line(
                "sample", f"{sampler} ({evaluations} NFE), {name}", each, spec.batch, flops, ceiling,
                name.split()[-1], times["plain fp32"],
            ))
    return lines + ([] if peer else [Line("sample", "diffusers' network", None, note=MISSING)])


def diffusion_of(sampler: str) -> KarrasDenoiser:
    """A consistency model for one step, EDM's denoiser for others."""
    return KarrasDenoiser(distillation=sampler == "onestep", loss_norm="l2")


def plain_job(spec: NetworkSpec, device: th.device, sampler: str) -> Job:
    """A batch sampled by plain loops."""
    model, diffusion, noise = plain_copy(spec.build(device).eval()), diffusion_of(sampler), spec.images(device)
    if sampler == "onestep":
        return partial(plain_one_step, diffusion, model, noise)
    return partial(plain_heun, diffusion, model, noise, [*diffusion.noise_levels(HEUN_STEPS).tolist(), 0.0])


def toolkit_job(
    build: Callable[[th.device], nn.Module], spec: NetworkSpec, device: th.device, sampler: str, dtype: str
) -> Job:
    """A batch sampled by the toolkit."""
    model, shape = build(device).eval(), spec.images(device).shape
    return partial(toolkit_way, model, diffusion_of(sampler), sampler, STEPS[sampler], shape, dtype)


def toolkit_way(model, diffusion: KarrasDenoiser, sampler: str, steps: int, shape, dtype: str) -> None:
    generator = get_generator("determ", shape[0], 0).for_samples(range(shape[0]))
    with th.inference_mode(), at_precision(model, dtype):
        sample(diffusion, model, shape, SampleOptions(steps, sampler), generator=generator)
