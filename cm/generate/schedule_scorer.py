"""The score of a multistep schedule: the distance of its images from a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch as th
from torch import nn

from cm.distributed import setup as dist
from cm.generate.engine import SamplingPlan, draw, labels_of, rank_batches
from cm.generate.finite import NonFiniteCount
from cm.generate.prefix_cache import PrefixCache
from cm.generate.schedule_search import Schedule, as_text
from cm.io.progress import progress
from cm.logging import logger
from cm.samplers.sample import SampleOptions
from evaluations.th_evaluator import ThEvaluator


@dataclass
class Scorer:
    """The Frechet distance of a schedule's images from the reference; lower is better.

    The images are those that image_sample.py draws with the same seed, so the distance is the evaluator's. To be
    called on all ranks together.

    :param options: how to sample; its `ts` are replaced by the schedule.
    """

    model: nn.Module
    prefixes: PrefixCache
    plan: SamplingPlan
    options: SampleOptions
    evaluator: ThEvaluator

    def __call__(self, ts: Schedule) -> tuple[float, int]:
        """The distance, and how many images went through the network for it: the same numbers on all ranks."""
        before = self.prefixes.evaluations
        distance = self.evaluator.evaluate(self.batches(ts))["frechet_distance"].value
        logger.log(f"ts {as_text(ts)}: {distance:.6g}")
        return distance, int(dist.all_reduce_sum(th.tensor(self.prefixes.evaluations - before)))

    def batches(self, ts: Schedule) -> Iterator[tuple[int, np.ndarray]]:
        """This rank's part of the images: a batch's place in the result, and its [n,H,W,3] uint8.

        :raises UserError: on every rank, after the last batch, if an image is not finite and the plan does not allow
            it.
        """
        non_finite = NonFiniteCount(self.plan.allow_non_finite)
        own = list(rank_batches(self.plan, dist.get_rank(), dist.get_world_size()))
        bar = progress(own, f"ts {as_text(ts)}", unit="batch", shown=dist.is_main(), leave=False)
        for batch, indices in enumerate(bar):
            if len(indices):
                denoiser, labels = self.prefixes.denoiser(ts, batch), labels_of(indices, self.plan)
                options = replace(self.options, ts=ts)
                drawn = draw(self.model, denoiser, self.plan, indices, labels, options)
                non_finite.add(drawn.finite)
                yield indices[0], drawn.images
        non_finite.check()
        non_finite.warn()
