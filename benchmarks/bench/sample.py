"""Sampling: the toolkit's samplers beside the plain way, same network, same noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch as th

from bench.baseline import plain_copy, plain_heun, plain_one_step
from bench.ceiling import Ceiling
from bench.lines import Line, speed_line
from bench.network import NetworkSpec, forward_flops
from bench.peer import MISSING, peer_of
from bench.timing import take_turns
from cm.generate.engine import at_precision
from cm.karras_diffusion import KarrasDenoiser
from cm.random_util import get_generator
from cm.samplers.sample import SampleOptions, sample

HEUN_STEPS = 5


def sample_suite(spec: NetworkSpec, device: th.device, ceiling: Ceiling, repeats: int) -> list[Line]:
    """One step and a few steps of Heun's method, in fp32 and bf16, beside plain fp32."""
    model = spec.build(device).eval()
    plain = plain_copy(model)
    consistency, teacher = KarrasDenoiser(distillation=True, loss_norm="l2"), KarrasDenoiser(loss_norm="l2")
    noise = spec.images(device)
    per_image = forward_flops(model, noise)
    levels = teacher.noise_levels(HEUN_STEPS).tolist() + [0.0]

    settings = {
        "onestep": (1, consistency, 1, lambda: plain_one_step(consistency, plain, noise)),
        "heun": (HEUN_STEPS, teacher, 2 * HEUN_STEPS - 1, lambda: plain_heun(teacher, plain, noise, levels)),
    }
    peer = peer_of(spec)
    others = {} if peer is None else {"diffusers' network": peer(device).eval()}
    lines = []
    for sampler, (steps, diffusion, evaluations, plain_way) in settings.items():
        jobs: dict[str, Callable[[], None]] = {"plain fp32": plain_way}
        for (way, network), dtype in itertools.product({"toolkit": model, **others}.items(), ("fp32", "bf16")):
            jobs[f"{way} {dtype}"] = partial(toolkit_way, network, diffusion, sampler, steps, noise.shape, dtype)
        times = take_turns(jobs, device, repeats)
        for name, each in times.items():
            flops = per_image * len(noise) * evaluations
            lines.append(speed_line(
                "sample", f"{sampler} ({evaluations} NFE), {name}", each, len(noise), flops, ceiling,
                name.split()[-1], times["plain fp32"],
            ))
    return lines + ([] if peer else [Line("sample", "diffusers' network", None, note=MISSING)])


def toolkit_way(model, diffusion: KarrasDenoiser, sampler: str, steps: int, shape, dtype: str) -> None:
    generator = get_generator("determ", shape[0], 0).for_samples(range(shape[0]))
    with th.inference_mode(), at_precision(model, dtype):
        sample(diffusion, model, shape, SampleOptions(steps, sampler), generator=generator)
