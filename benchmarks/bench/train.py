"""Training steps: the toolkit's loops beside the plain way, same network, same loss, same images."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch as th
from torch import Tensor, nn

from bench.baseline import PlainStep, batch_of, plain_copy
from bench.ceiling import Ceiling
from bench.contestants import take_turns_apart
from bench.lines import Line, speed_line
from bench.network import NetworkSpec, forward_flops
from bench.peer import MISSING, peer_of
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.objectives.curricula import ema_and_scales
from cm.train_util import CMTrainLoop, TrainLoop
from cm.types import Batch

EMA_RATES = (0.999, 0.9999, 0.9999432189950708)             # as many as the published recipes keep
SCALES = 40
# Forward passes of a step, a backward pass counting as two: online 3, target 1, a teacher's Heun step 2.
PASSES = {"edm": 3, "consistency_distillation": 6, "consistency_training": 4}


def train_suite(spec: NetworkSpec, device: th.device, ceiling: Ceiling, repeats: int) -> list[Line]:
    """A line for each mode, way and precision."""
    lines = []
    images = spec.images(device)
    per_image = forward_flops(spec.build(device), images)
    peer = peer_of(spec)
    for mode, passes in PASSES.items():
        common = mode, spec, device, images
        makers: dict[str, Callable[[], Callable[[], None]]] = {
            "plain fp32": partial(plain_job, *common),
            **{f"toolkit {dtype}": partial(toolkit_job, *common, dtype) for dtype in ("fp32", "bf16")},
        }
        if peer is not None:
            makers |= {f"diffusers' network {dtype}": partial(toolkit_job, *common, dtype, build=peer)
                       for dtype in ("fp32", "bf16")}
        times = take_turns_apart(makers, device, repeats, plain=["plain fp32"])
        for name, each in times.items():
            dtype = name.split()[-1]
            lines.append(speed_line(
                "train", f"{mode}, {name}", each, len(images), passes * per_image * len(images), ceiling, dtype,
                times["plain fp32"],
            ))
    return lines + ([] if peer else [Line("train", "diffusers' network", None, note=MISSING)])


def diffusions(mode: str) -> tuple[KarrasDenoiser, KarrasDenoiser]:
    """The student's and the teacher's."""
    is_consistency = mode != "edm"
    weights = "uniform" if is_consistency else "karras"
    own = KarrasDenoiser(distillation=is_consistency, weight_schedule=weights, loss_norm="l2")
    return own, KarrasDenoiser(loss_norm="l2")


def toolkit_job(
    mode: str, spec: NetworkSpec, device: th.device, images: Tensor, precision: str, *,
    ema_rates: Sequence[float] = EMA_RATES, scales: int = SCALES,
    build: Callable[[th.device], nn.Module] | None = None,
) -> Callable[[], None]:
    """One step of the toolkit's training loop; arguments of `toolkit_loop`."""
    loop = toolkit_loop(mode, spec, device, images, precision, ema_rates=ema_rates, scales=scales, build=build)
    return lambda: loop.run_step(next(loop.data))


def toolkit_loop(
    mode: str, spec: NetworkSpec, device: th.device, images: Tensor, precision: str, *,
    ema_rates: Sequence[float] = EMA_RATES, scales: int = SCALES,
    build: Callable[[th.device], nn.Module] | None = None,
) -> TrainLoop:
    """The toolkit's training loop, before its first step.

    :param build: makes the networks; None for the toolkit's own.
    """
    build = build or spec.build
    logger.configure(tempfile.mkdtemp(), format_strs=[])
    diffusion, teacher_diffusion = diffusions(mode)
    common = dict(
        model=build(device), diffusion=diffusion, data=stream(images), batch_size=len(images), lr=1e-4,
        ema_rate=",".join(map(str, ema_rates)), log_interval=10**6, save_interval=10**6, total_training_steps=10**6,
        precision=precision,
    )
    if mode == "edm":
        return TrainLoop(**common)
    distils = mode == "consistency_distillation"
    return CMTrainLoop(
        target_model=build(device), teacher_model=build(device).eval() if distils else None,
        teacher_diffusion=teacher_diffusion if distils else None, training_mode=mode,
        ema_scale_fn=ema_and_scales("fixed", 0.95, "fixed", scales, scales, 10**6, 10**6), **common,
    )


def stream(images: Tensor) -> Iterator[Batch]:
    return (batch_of(images, step) for step in itertools.count())


def plain_job(mode: str, spec: NetworkSpec, device: th.device, images: Tensor) -> partial[None]:
    """One step of plain loops over the same loss."""
    model = plain_copy(spec.build(device))
    diffusion, teacher_diffusion = diffusions(mode)
    if mode == "edm":
        def loss_of(model: nn.Module, images: Tensor) -> Tensor:
            sigmas = (th.randn(len(images), device=device) * 1.2 - 1.2).exp()
            return diffusion.training_losses(model, images, sigmas)["loss"]

        return partial(PlainStep(model, diffusion, loss_of, EMA_RATES), images)
    others = {"target_model": plain_copy(model)}
    if mode == "consistency_distillation":
        others |= {"teacher_model": plain_copy(model), "teacher_diffusion": teacher_diffusion}
    for other in (others["target_model"], others.get("teacher_model")):
        if other is not None:
            other.requires_grad_(False)

    def loss_of(model: nn.Module, images: Tensor) -> Tensor:
        return diffusion.consistency_losses(model, images, SCALES, **others)["loss"]

    # The target's average is one more loop over the parameters.
    return partial(PlainStep(model, diffusion, loss_of, (*EMA_RATES, 0.95)), images)
