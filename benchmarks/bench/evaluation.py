"""The parts of an evaluation: what the network takes, and what the numbers made of its features take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch as th

from bench.lines import Line
from bench.timing import take_turns
from evaluations.features.inception_v3 import InceptionV3
from evaluations.metrics.frechet import Moments, frechet
from evaluations.metrics.precision_recall import BLOCK, pairs, precision_recall

PUBLISHED = 50_000                                          # images of a published evaluation


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are Inception's features."""

    pooled: int = 2048
    spatial: int = 2023
    batch: int = 2048                                       # rows of features that are taken in at once
    points: int = 10_000                                    # on each side of precision and recall
    images: int = 16                                        # of a batch of the network
    side: int = 64


def eval_suite(device: th.device, repeats: int, sizes: Sizes = Sizes()) -> list[Line]:
    """Frechet distance, moments, precision and recall on the CPU, and the network on the device."""
    rng = np.random.default_rng(0)

    def features(rows: int, dim: int) -> np.ndarray:
        return rng.standard_normal((rows, dim), np.float32)

    jobs: dict[str, Callable[[], object]] = {}
    counts: dict[str, int] = {}                             # images or rows of features that a job takes
    for name, dim in (("pooled", sizes.pooled), ("spatial", sizes.spatial)):
        moments = Moments(dim)
        moments.update(features(2 * dim, dim))
        jobs[f"Frechet distance, {dim} {name} features"] = partial(frechet, *moments.finalize(), *moments.finalize())
        jobs[f"moments, {dim} {name} features"] = partial(take_in, Moments(dim), features(sizes.batch, dim))
        counts[f"moments, {dim} {name} features"] = sizes.batch
    network, images = InceptionV3().eval().to(device), th.rand(sizes.images, 3, sizes.side, sizes.side, device=device)
    jobs["Inception-v3"] = partial(th.inference_mode()(network), images * 255)
    counts["Inception-v3"] = sizes.images
    times = take_turns(jobs, device, repeats)
    lines = []
    for name, each in times.items():
        speed = counts[name] / each.median if name in counts else None
        lines.append(Line("eval", name, each.median, speed, note=per_published(speed)))
    return lines + [precision_recall_line(features(sizes.points, sizes.pooled), features(sizes.points, sizes.pooled))]


def take_in(moments: Moments, features: np.ndarray) -> None:
    moments.update(features)
    _ = moments.Q                                           # else they may wait for more


def per_published(images_per_second: float | None) -> str:
    return "" if images_per_second is None else f"{PUBLISHED} images: {PUBLISHED / images_per_second:.1f} s"


def precision_recall_line(ref: np.ndarray, sample: np.ndarray) -> Line:
    """Once, as it takes long; and what its law, the number of pairs, says of published sizes."""
    seconds = take_turns(
        {"pr": lambda: precision_recall(ref, sample)}, th.device("cpu"), repeats=1, warm_up=0
    )["pr"].median
    n, dim = ref.shape
    law = seconds * pairs(PUBLISHED, PUBLISHED, BLOCK) / pairs(n, len(sample), BLOCK)
    return Line("eval", f"precision and recall, {n} x {len(sample)}, {dim} features", seconds,
                note=f"by the number of pairs, {PUBLISHED} x {PUBLISHED}: {law / 60:.1f} min")
