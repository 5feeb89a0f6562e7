"""The Frechet distance that a training run measures of its own samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cm.distributed import setup as dist
from evaluations.engine.statistics_cache import open_cache
from evaluations.features import load_extractor
from evaluations.metrics.frechet import FRECHET_KEY
from evaluations.th_evaluator import ThEvaluator


@dataclass(frozen=True)
class TrainingMetric:
    """Distances from one reference, with their names in the log. All ranks must call its methods together.

    :param key: `fid` in Inception's features, `frechet_distance` in those of another network.
    :param label: the same for people, with the name of the features.
    :param id: of the extractor: values of another one cannot be compared with these.
    """

    evaluator: ThEvaluator
    key: str
    label: str
    id: str

    def distance(self, batches: Iterable[tuple[int, NDArray[np.uint8]]]) -> float:
        """The distance of the images of all ranks; the same number on every rank.

        :param batches: this rank's share, possibly none: the row of a batch's first image, and [B,H,W,3].
        """
        return self.evaluator.evaluate(batches)[FRECHET_KEY].value


def open_metric(
    ref: str, inception: str, image_size: int, batch_size: int, num_samples: int, trusted: bool = False
) -> TrainingMetric:
    """Load the extractor and measure the reference.

    :param ref: npz of reference images or of statistics.
    :param inception: an extractor, see `load_extractor`; empty for the environment's.
    :param image_size: side of the samples in pixels.
    :param batch_size: images of the reference per pass and rank.
    :param num_samples: how many samples a distance will be of; a warning says if they are few.
    :param trusted: see `load_extractor`.
    :raises UserError: if one of the two cannot be used, or they do not fit together.
    """
    extractor = load_extractor(inception or None, dist.dev(), trusted=trusted)
    evaluator = ThEvaluator(ref, extractor, image_size, batch_size=batch_size, cache=open_cache(None))
    evaluator.warn_of_few(num_samples)
    key = "fid" if extractor.is_inception else FRECHET_KEY
    return TrainingMetric(evaluator, key, evaluator.label, extractor.id)
