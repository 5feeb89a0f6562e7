"""Plans two training runs from the images, the speed of the machine and the given time.

A pure function without torch. All times are in seconds, memory in bytes of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cm.errors import UserError
from cm.io.terminal import size_text
from cm.quickstart.look import Findings
from cm.quickstart.networks import Candidate, candidates, network_flags, preset

TEACHER_SHARE = 0.7                                         # of the time for training; the student has the rest
SAFETY = 0.9                                                # of the time left is planned: steps are not all alike
DRAWING_SHARE = 0.1                                         # of all time, at most, for samples
GRIDS_SHARE = 0.05                                          # and for pictures during training
START_FACTOR = 1.5                                          # a training also opens its data and saves
EVALUATION_SHARE = 0.1                                      # and for the numbers, where there are to be any
LONGEST_EVALUATION_S = 1800.0
CLASSIFIER_S = 15.0                                         # for the digits' classifier
MEMORY_SHARE = 0.8                                          # of what is free
BATCHES = (32, 64, 128, 256, 512)
WANTED_STEPS = 1000                                         # of the teacher: a larger batch only if it leaves so many
LEAST_STEPS = 20                                            # of each training; fewer learn nothing
LEAST_SAMPLES = 32
GRIDS, GRID_IMAGES = 4, 64                                  # pictures during a training, each of so many images
HEUN_STEPS = 18
HEUN_EVALUATIONS = 2 * HEUN_STEPS - 1
EVALUATIONS = {"teacher": HEUN_EVALUATIONS, "onestep": 1, "twostep": 2}     # of one sample
EXTRA_PASSES = {"ect": 1, "cd": 3}                          # forward passes of a step beside a denoising step's
STUDENT_LR = 0.5                                            # times the teacher's


@dataclass(frozen=True)
class Wish:
    """The choices of the user; empty or 0 for what the plan chooses.

    :param evaluates: whether metrics are computed: an extractor is given, or the images are the digits.
    """

    hours: float
    method: str = "ect"
    size: str = ""
    image_size: int = 0
    num_samples: int = 1000
    max_steps: int = 0
    random_flip: bool | None = None
    labels: str = "auto"
    evaluates: bool = False


@dataclass(frozen=True)
class Speed:
    """Measurements of one network on all ranks together.

    :param held: bytes on a rank between steps, in the larger of the two trainings.
    :param per_image: bytes that a pass keeps for the backward pass, for each image on a rank.
    :param steps: (images of a batch, seconds of its training step), from the smallest batch to the largest.
    :param forward: seconds for an image through the network, without gradients.
    """

    name: str
    image_size: int
    parameters: int
    held: int
    per_image: int
    steps: tuple[tuple[int, float], ...]
    forward: float

    def step(self, batch: int) -> float:
        """The time of a training step; for more images than were measured, an upper bound in proportion to them."""
        below = self.steps[0]
        if batch <= below[0]:
            return below[1]
        for size, seconds in self.steps[1:]:
            if batch <= size:
                return below[1] + (seconds - below[1]) * (batch - below[0]) / (size - below[0])
            below = (size, seconds)
        return below[1] * batch / below[0]


@dataclass(frozen=True)
class Machine:
    """The machine on which the commands run.

    :param free: memory of one rank in bytes; None if it is not known.
    :param start: seconds that a command takes before its work starts.
    """

    device: str
    precision: str
    ranks: int
    free: int | None
    start: float
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class Plan:
    """The planned runs.

    :param times: purpose -> planned seconds.
    :param memory: estimated memory of one rank in bytes.
    :param teacher, student: the flags of the two trainings.
    """

    network: str
    image_size: int
    parameters: int
    batch: int
    method: str
    num_samples: int
    times: dict[str, float]
    memory: int
    teacher: dict[str, Any]
    student: dict[str, Any]


def make_plan(found: Findings, machine: Machine, wish: Wish, spent: float = 0.0) -> Plan:
    """The largest network that is worth its time, and the trainings that fill the time.

    More time never makes the network smaller.

    :param spent: the time that has passed already.
    :raises UserError: if no network fits the time or the memory.
    """
    speeds = {speed.name: speed for speed in machine.speeds}
    fitting = [each for each in candidates(found, wish.size, wish.image_size) if each.name in speeds]
    small_enough = [each for each in fitting if microbatch(machine, speeds[each.name], BATCHES[0])]
    if not small_enough:
        raise UserError(too_large(machine, speeds[fitting[0].name]))
    seconds = 3600 * wish.hours
    drafts = [Draft(each, speeds[each.name], machine, wish) for each in small_enough]
    possible = [draft for draft in drafts if draft.is_possible(seconds - spent)]
    if not possible:
        raise UserError(too_short(wish, lambda hours: drafts[0].is_possible(3600 * hours - spent)))
    chosen = [draft for draft in possible if draft.is_worthwhile(seconds - spent)] or possible
    return chosen[-1].plan(found, seconds - spent, spent)


@dataclass(frozen=True)
class Draft:
    """One candidate, and how it would divide the time."""

    candidate: Candidate
    speed: Speed
    machine: Machine
    wish: Wish

    def reserved(self, seconds: float) -> dict[str, float]:
        """The time that is not for training."""
        forward, wish = self.speed.forward, self.wish
        sampling = forward * sum(EVALUATIONS.values())
        commands = 6 + 4 * wish.evaluates                   # two trainings, three samplings, the report; the numbers
        grids = forward * GRIDS * GRID_IMAGES * (HEUN_EVALUATIONS + 1)
        evaluating = CLASSIFIER_S + min(EVALUATION_SHARE * seconds, LONGEST_EVALUATION_S)
        return {
            "starting the commands": commands * self.machine.start,
            "pictures during training": min(grids, GRIDS_SHARE * seconds),
            "sampling": max(sampling * min(LEAST_SAMPLES, wish.num_samples),
                            min(sampling * wish.num_samples, DRAWING_SHARE * seconds)),
            "evaluating": evaluating if wish.evaluates else 0.0,
        }

    def training(self, seconds: float) -> float:
        """The time for both trainings."""
        return SAFETY * (seconds - sum(self.reserved(seconds).values()))

    def batch(self, seconds: float) -> int:
        """The largest batch that leaves enough steps, and is no slower for each image than smaller ones."""
        chosen = BATCHES[0]
        for batch in BATCHES[1:]:
            enough = TEACHER_SHARE * self.training(seconds) / self.speed.step(batch) >= WANTED_STEPS
            if enough and self.speed.step(batch) / batch <= self.speed.step(chosen) / chosen:
                chosen = batch
        return chosen

    def steps(self, seconds: float) -> tuple[int, int]:
        """The steps of teacher and student, without a limit."""
        batch, training = self.batch(seconds), max(0.0, self.training(seconds))
        step = self.speed.step(batch)
        extra = EXTRA_PASSES[self.wish.method] * batch * self.speed.forward
        return int(TEACHER_SHARE * training / step), int((1 - TEACHER_SHARE) * training / (step + extra))

    def is_possible(self, seconds: float) -> bool:
        """Whether both trainings have enough steps to learn anything."""
        return seconds > 0 and min(self.steps(seconds)) >= LEAST_STEPS

    def is_worthwhile(self, seconds: float) -> bool:
        """Whether the teacher sees as many images as its size needs."""
        batch = self.batch(seconds)
        images = TEACHER_SHARE * self.training(seconds) / self.speed.step(batch) * batch
        return images >= 1000 * self.candidate.size.needs_kimg

    def plan(self, found: Findings, seconds: float, spent: float) -> Plan:
        """The plan for this candidate."""
        wish, speed, batch, limit = self.wish, self.speed, self.batch(seconds), self.wish.max_steps or math.inf
        steps = [int(min(each, limit)) for each in self.steps(seconds)]
        reserved = self.reserved(seconds)
        samples = min(wish.num_samples, max(LEAST_SAMPLES, int(
            reserved["sampling"] / (speed.forward * sum(EVALUATIONS.values())))))
        grids = min(GRIDS, int(reserved["pictures during training"] / max(
            1e-9, speed.forward * GRID_IMAGES * (HEUN_EVALUATIONS + 1))))
        part = microbatch(self.machine, speed, batch)
        extra = EXTRA_PASSES[wish.method] * batch * speed.forward
        times = {
            "looking and measuring": spent,
            "training the teacher": steps[0] * speed.step(batch),
            "training the student": steps[1] * (speed.step(batch) + extra),
            **{name: value for name, value in reserved.items() if value},
        }
        flags = [self.common(found, batch, part, each, grids) for each in steps]
        lr = learning_rate(preset(self.candidate.name), batch)
        return Plan(
            self.candidate.name, self.candidate.image_size, speed.parameters, batch, wish.method, samples, times,
            speed.held + part * speed.per_image,
            teacher=network_flags(self.candidate, found) | flags[0] | {"lr": lr, "eval_steps": HEUN_STEPS},
            student=METHODS[wish.method](steps[1], self.machine.precision) | flags[1] | {"lr": STUDENT_LR * lr},
        )

    def common(self, found: Findings, batch: int, part: int, steps: int, grids: int) -> dict[str, Any]:
        """The flags that both trainings have."""
        share = -(-batch // self.machine.ranks)
        flip = self.wish.random_flip
        return {
            "data_dir": found.data_dir, "labels": self.wish.labels,
            "random_flip": not found.grey if flip is None else flip,        # writing and scans have a left and a right
            "global_batch_size": batch, "microbatch": part if part < share else -1, "total_training_steps": steps,
            "ema_rate": preset(self.candidate.name)["ema_rate"], "precision": "auto",
            "log_interval": max(1, steps // 50), "save_interval": max(1, -(-steps // 10)),
            "sample_interval": max(1, -(-steps // grids)) if grids else 0,
        }


def ect_flags(steps: int, precision: str) -> dict[str, Any]:
    """Easy consistency tuning; fewer stages if there are few steps, or in bf16, which does not resolve the last two."""
    most = 6 if precision == "bf16" else 8
    return {"training_mode": "ect", "shrink_q": 2.0, "stages": 4 if steps < 2000 else most, "dropout": 0.0}


def cd_flags(steps: int, precision: str) -> dict[str, Any]:
    """Consistency distillation, with the flags of the preset digits/cd."""
    return {
        "training_mode": "consistency_distillation", "teacher_dropout": 0.0, "target_ema_mode": "fixed",
        "start_ema": 0.9 if steps < 2000 else 0.95, "scale_mode": "fixed", "start_scales": HEUN_STEPS,
        "end_scales": HEUN_STEPS, "loss_norm": "l2", "weight_schedule": "uniform",
    }


METHODS: dict[str, Callable[[int, str], dict[str, Any]]] = {"ect": ect_flags, "cd": cd_flags}
"""Few-step method -> its flags for a training of so many steps."""


def learning_rate(flags: dict[str, Any], batch: int) -> float:
    """The learning rate of the preset, times the square root of the relative batch size, rounded to two digits."""
    return float(f"{flags['lr'] * min(1.0, math.sqrt(batch / flags['global_batch_size'])):.1e}")


def microbatch(machine: Machine, speed: Speed, batch: int) -> int:
    """Images of a pass on a rank that fit into its memory: a rank's share of the batch, or a power of two; 0: none."""
    share = -(-batch // machine.ranks)
    if machine.free is None:
        return share
    fits = int((MEMORY_SHARE * machine.free - speed.held) // max(1, speed.per_image))
    return share if fits >= share else 2 ** int(math.log2(fits)) if fits >= 1 else 0


def too_large(machine: Machine, speed: Speed) -> str:
    """The error if no network fits the memory."""
    return (f"the network {speed.name} for {speed.image_size}x{speed.image_size} needs {size_text(speed.held)} and "
            f"{size_text(speed.per_image)} an image on each of {machine.ranks} rank(s), and of the "
            f"{size_text(machine.free or 0)} that are free at most {MEMORY_SHARE:.0%} are planned: give a smaller "
            "--size or --image_size, fewer --ranks, or free some memory")


def too_short(wish: Wish, is_possible: Callable[[float], bool]) -> str:
    """The error if the time is too short, with the least time that is enough."""
    hours = max(wish.hours, 1e-4)
    while not is_possible(hours) and hours < 1e6:
        hours *= 1.1
    return (f"--hours {wish.hours:g} ({3600 * wish.hours:.0f} s) is too short for two trainings of {LEAST_STEPS} "
            f"steps, samples and the start of each command; the least here is about --hours {hours:.2g}")
