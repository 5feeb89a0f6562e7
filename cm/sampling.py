"""Sample images over all ranks: exactly as many as asked, each depending on the seed and its own index alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from torch import nn
from tqdm import tqdm

from cm import dist_util
from cm.karras_diffusion import KarrasDenoiser, sample
from cm.random_util import get_generator, labels_for
from cm.sample_files import NpzWriter, to_uint8

SHOWN = 64                                      # images in a grid


@dataclass(frozen=True)
class SamplingPlan:
    """What to draw; see `cm.config.SampleConfig` for the meaning of each."""

    num_samples: int
    batch_size: int
    image_size: int
    seed: int
    num_classes: int | None                     # None: unconditional
    class_label: int = -1
    generator: str = "determ"


@dataclass(frozen=True)
class SamplingResult:
    path: str | None                            # of the npz, on rank 0
    first_images: np.ndarray | None             # the first of them, [<=64,H,W,3], on rank 0: to look at
    evaluations: int                            # network evaluations per image (NFE)
    seconds: float


def rounds(plan: SamplingPlan, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """The sample indices of this rank, round by round; every rank has the same number of rounds, some of them empty."""
    per_round = plan.batch_size * world_size
    for first in range(0, plan.num_samples, per_round):
        start = first + rank * plan.batch_size
        yield np.arange(start, max(start, min(start + plan.batch_size, plan.num_samples)))


def labels_of(indices: np.ndarray, plan: SamplingPlan) -> np.ndarray | None:
    if plan.num_classes is None:
        return None
    if plan.class_label >= 0:
        return np.full(len(indices), plan.class_label, np.int64)
    return np.asarray(labels_for(indices, plan.seed, plan.num_classes), np.int64)


def at_precision(model: nn.Module, precision: str) -> AbstractContextManager:
    """The context in which a float32 model samples in fp32, bf16 or fp16."""
    if precision == "fp16":
        model.convert_to_fp16()
    if precision == "bf16":
        return th.autocast(dist_util.dev().type, dtype=th.bfloat16)
    return nullcontext()


@th.inference_mode()
def draw(
    model: nn.Module, diffusion: KarrasDenoiser, plan: SamplingPlan, indices: np.ndarray, labels: np.ndarray | None,
    **sampler_options: Any,
) -> tuple[np.ndarray, int]:
    """Images of these indices: [n,H,W,3] uint8, and the network evaluations each took."""
    size, device = plan.image_size, dist_util.dev()
    if len(indices) == 0:
        return np.zeros((0, size, size, 3), np.uint8), 0
    noise = get_generator(plan.generator, plan.num_samples, plan.seed).for_samples(th.as_tensor(indices))
    cond = {} if labels is None else {"y": th.as_tensor(labels, device=device)}
    result = sample(
        diffusion, model, (len(indices), 3, size, size), model_kwargs=cond, device=device, generator=noise,
        **sampler_options,
    )
    return to_uint8(result.images), result.evaluations


def sample_to_npz(
    model: nn.Module, diffusion: KarrasDenoiser, plan: SamplingPlan, directory: str, precision: str,
    **sampler_options: Any,
) -> SamplingResult:
    """Draw the plan on all ranks; rank 0 writes each round as it comes, and nobody else holds more than its own."""
    main = dist_util.is_main()
    size, start, evaluations = plan.image_size, time.monotonic(), 0
    writer = NpzWriter(directory, plan.num_samples, size, size, plan.num_classes is not None) if main else None
    bar = tqdm(total=plan.num_samples, unit="image", desc="sampling", disable=not main, dynamic_ncols=True)
    with bar, at_precision(model, precision):
        for indices in rounds(plan, dist_util.get_rank(), dist_util.get_world_size()):
            labels = labels_of(indices, plan)
            images, calls = draw(model, diffusion, plan, indices, labels, **sampler_options)
            evaluations = max(evaluations, calls)
            parts = [dist_util.gather_to_main(part) for part in (indices, images)]
            all_labels = None if labels is None else dist_util.gather_to_main(labels)
            if main:
                whose = np.concatenate(parts[0])
                writer.put(whose, np.concatenate(parts[1]), None if labels is None else np.concatenate(all_labels))
                bar.update(len(whose))
    first_images = writer.images[:SHOWN].copy() if main else None
    path = writer.close() if main else None
    return SamplingResult(path, first_images, evaluations, time.monotonic() - start)
