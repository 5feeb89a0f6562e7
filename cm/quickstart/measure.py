"""Measurements of a machine that a plan needs: the memory and the step time of each network, on all ranks.

mpiexec -n 2 python -m cm.quickstart.measure REQUEST.json RESULT.json       started by cm-quickstart
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch as th

from cm.config.flags import Settings, resolve
from cm.config.schema import TRAINING_SECTIONS
from cm.distributed import setup as dist
from cm.io.storage import write_json
from cm.logging import logger
from cm.quickstart.look import Findings
from cm.quickstart.networks import Candidate, candidates, network_flags
from cm.quickstart.plan import BATCHES, METHODS, Draft, Machine, Speed, Wish, microbatch
from cm.setup import rules
from cm.setup.dry_run import free_memory, memory_of, planned_run
from cm.setup.model import model_from
from cm.setup.objective import objective_kind
from cm.setup.run import run_precision
from cm.setup.train import make_loop
from cm.training.loop import TrainLoop, as_batch
from cm.training.memory_estimate import plan

STEPS = 5                                                   # timed steps of a batch, after the first
FIRST = 3                                                   # the first step takes about so many times longer: warm-up


def main(request: Path, result: Path) -> None:
    """Read what is asked for from a file, and write a `Machine`, without the time of a start, to another."""
    dist.setup_dist()
    start_time = time.monotonic()
    asked = dist.on_main(lambda: json.loads(request.read_text()))
    logger.configure(str(request.parent), [], rank=dist.get_rank())
    machine = measure(Findings(**asked["found"]), Wish(**asked["wish"]), asked["seconds"])
    content = {"machine": dataclasses.asdict(machine), "seconds": time.monotonic() - start_time}
    dist.on_main(write_json, result, content)


def measure(found: Findings, wish: Wish, seconds: float) -> Machine:
    """The machine, with the networks that fit its memory, up to the first that is too slow; on all ranks together.

    :param seconds: about how long to measure; the smallest network is measured however short this is.
    """
    end = time.monotonic() + seconds
    device = "cpu" if dist.dev().type == "cpu" else th.cuda.get_device_name(dist.dev())
    precision = run_precision(settings_of({"precision": "auto"}))
    machine = Machine(device, precision, dist.get_world_size(), free_of_a_rank(), 0.0, ())
    for candidate in candidates(found, wish.size, wish.image_size):
        speed = measured(candidate, found, machine, wish, end)
        machine = dataclasses.replace(machine, speeds=(*machine.speeds, speed))
        if not microbatch(machine, speed, BATCHES[0]):
            break                                           # nor do larger ones fit; the planner says so
        slow = not Draft(candidate, speed, machine, wish).is_worthwhile(3600 * wish.hours)
        if slow or dist.broadcast_object(time.monotonic() > end):
            break
    return machine


def free_of_a_rank() -> int | None:
    """Bytes of memory that each rank may take; ranks that share a machine without GPUs share its memory."""
    if dist.dev().type == "cuda":
        return min(dist.all_gather_object(th.cuda.mem_get_info(dist.dev())[0]))
    free = dist.on_main(free_memory)
    return free // dist.get_world_size() if free else None


def measured(candidate: Candidate, found: Findings, machine: Machine, wish: Wish, end: float) -> Speed:
    """A network's memory, then its time for batches of growing size, as long as there is time."""
    flags = network_flags(candidate, found) | {
        "data_dir": found.data_dir, "labels": wish.labels, "precision": "auto", "training_mode": "edm",
        "total_training_steps": 1000, "ema_rate": "500kimg", "global_batch_size": BATCHES[0], "resume": "auto",
    }
    held, per_image, parameters = memory(flags, METHODS[wish.method](1000, "fp32"))
    speed = Speed(candidate.name, candidate.image_size, parameters, held, per_image, (), 0.0)
    if not microbatch(machine, speed, BATCHES[0]):
        return speed
    for batch in BATCHES[::2]:
        part = microbatch(machine, speed, batch)
        step, forward = timed(flags | {"global_batch_size": batch, "microbatch": part}, end)
        speed = dataclasses.replace(speed, steps=(*speed.steps, (batch, step)), forward=forward)
        ahead = BATCHES[2] / BATCHES[0] * step * (STEPS + FIRST)
        if dist.broadcast_object(time.monotonic() + ahead > end):
            break
    return speed


def settings_of(flags: dict[str, Any]) -> Settings:
    """The settings of a training run from flags."""
    return resolve(flags, *TRAINING_SECTIONS)


def memory(flags: dict[str, Any], student: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes on a rank between the steps of the larger training, bytes that a pass keeps per image, and parameters."""
    settings = settings_of(flags)
    with th.device("meta"):
        model = model_from(settings)
    held, kept, images = memory_of(settings, model)
    run, _ = planned_run(settings_of(flags | student))
    most = max(sum(each.device.values()) for each in (held, plan(model, run)))
    return most, -(-kept // images), sum(param.numel() for param in model.parameters())


def timed(flags: dict[str, Any], end: float) -> tuple[float, float]:
    """Seconds of a training step, and of an image through the network without gradients; the same on every rank."""
    free_memory_of_loops()                                  # of the network before, which is as large as this one
    settings = settings_of(flags)
    rules.resolve(settings, rules.TRAINING)
    loop, _ = make_loop(settings, objective_kind(settings.values))
    loop.resume()
    try:
        step = step_seconds(loop) / FIRST
        if not dist.broadcast_object(time.monotonic() + STEPS * step > end):
            step = statistics.median(step_seconds(loop) for _ in range(STEPS))
        return dist.broadcast_object((step, forward_seconds(loop)))
    finally:
        if loop.close_data:
            loop.close_data()


def free_memory_of_loops() -> None:
    """Give back what measured loops held: their parts refer to each other, and Python would look for them some time."""
    gc.collect()
    if th.cuda.is_initialized():
        th.cuda.empty_cache()


def step_seconds(loop: TrainLoop) -> float:
    """The time of a step with its data; a step waits for its device."""
    start_time = time.monotonic()
    loop.run_step(as_batch(next(loop.data), loop.images_seen, loop.rank, loop.world_size))
    return time.monotonic() - start_time


@th.no_grad()
def forward_seconds(loop: TrainLoop) -> float:
    """The time that all ranks together take for an image through the network."""
    batch = as_batch(next(loop.data), loop.images_seen, loop.rank, loop.world_size).to(loop.device)
    part = batch.rows(0, loop.microbatch)
    denoiser, sigma = loop.diffusion.bind(loop.model), th.ones(len(part), device=loop.device)
    start_time = 0.0
    for _ in range(2):                                      # the first chooses kernels
        start_time = time.monotonic()
        with loop.trainer.autocast():
            denoiser(part.images, sigma, **part.cond).sum().item()      # waits for the device
    return (time.monotonic() - start_time) / (len(part) * loop.world_size)


if __name__ == "__main__":
    dist.run(lambda: main(*map(Path, sys.argv[1:])))
