"""Training steps of the denoising objectives beside EDM's: same network, same images, same loop."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch as th
from torch import Tensor

from bench.baseline import batch_of
from bench.ceiling import Ceiling
from bench.lines import Line, speed_line
from bench.network import NetworkSpec, forward_flops
from bench.timing import make_and_take_turns
from cm.diffusion.noise_sampling import create_named_schedule_sampler
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.objectives import DENOISING
from cm.setup.objective import PUBLISHED_NOISE
from cm.train_util import TrainLoop
from cm.types import Batch

# name -> (objective, its options, preconditioning, forward passes of a step where a backward pass counts as two)
JOBS = {
    "edm": ("edm", {}, "edm", 3),
    "cdm, 6 levels": ("cdm", {}, "edm", 3 * 3 + 2 * 4),
    "cdm, 2 levels": ("cdm", {"martingale_steps": 2}, "edm", 3 * 3),
    "stf, 4096 references": ("stf", {}, "edm", 3),
    "sadpm, 2 steps": ("sadpm", {}, "ddpm", 2 * 3),
}


def objectives_suite(spec: NetworkSpec, device: th.device, ceiling: Ceiling, repeats: int) -> list[Line]:
    """A line for each objective, in float32; the note compares its time with EDM's."""
    images = spec.images(device)
    per_image = forward_flops(spec.build(device), images)
    makers = {name: partial(job, *how[:3], spec, device, images) for name, how in JOBS.items()}
    times, lines = make_and_take_turns(makers, device, repeats), []
    for name, (*_, passes) in JOBS.items():
        flops = passes * per_image * len(images)
        line = speed_line("objectives", name, times[name], len(images), flops, ceiling, "fp32")
        lines.append(replace(line, note=f"{times[name].ratio(times['edm']):.2f} of edm's time, {passes / 3:.2f} of "
                                        "its network passes"))
    return lines


def job(
    objective: str, options: dict, precond: str, spec: NetworkSpec, device: th.device, images: Tensor
) -> Callable[[], None]:
    """One step of the training loop."""
    loop = loop_of(objective, options, precond, spec, device, images)
    return lambda: loop.run_step(next(loop.data))


def loop_of(
    objective: str, options: dict, precond: str, spec: NetworkSpec, device: th.device, images: Tensor
) -> TrainLoop:
    """With the law of levels and the weights that the command would choose."""
    logger.configure(tempfile.mkdtemp(), format_strs=[])
    published = PUBLISHED_NOISE.get(precond, {"schedule_sampler": "lognormal", "weight_schedule": "karras"})
    diffusion = KarrasDenoiser(precond=precond, loss_norm="l2", weight_schedule=published["weight_schedule"])
    law = create_named_schedule_sampler(published["schedule_sampler"], diffusion)
    made = DENOISING[objective].of(diffusion, law, options)
    references = Batch(th.randint(0, 256, (made.references, *images.shape[1:]), dtype=th.uint8))
    references.positions = th.arange(-made.references, 0)

    def batches():
        for step in itertools.count():
            batch = batch_of(images, step)
            batch.references = references if made.references else None
            yield batch

    return TrainLoop(
        model=spec.build(device), diffusion=diffusion, data=batches(), objective=made, batch_size=len(images), lr=1e-4,
        ema_rate="0.9999", log_interval=10**6, save_interval=10**6, total_training_steps=10**6,
    )
