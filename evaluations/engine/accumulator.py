"""What one pass of an extractor over images leaves: sums, and the points of the metrics that need them.

Shapes: N images of the set, B of a batch, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch as th
from numpy.typing import NDArray

from cm.distributed import setup as dist
from cm.errors import UserError
from evaluations.features import Extractor, Features
from evaluations.metrics.frechet import Moments
from evaluations.metrics.inception_score import InceptionScore


@dataclass(frozen=True)
class FeatureKind:
    """A kind of features that has a mean and covariance."""

    field: str                                              # of `Features`
    suffix: str                                             # of the keys mu, sigma in a file


POOLED = FeatureKind("pool", "")
SPATIAL = FeatureKind("spatial", "_s")


class FeatureAccumulator:
    """Running float64 sums of the features of images, their score, and where asked for the pooled features themselves.

    :param dims: the kinds of features whose mean and covariance are wanted, and their dimensions.
    :param split_size: images per chunk of the Inception Score; 0 for no score.
    :param points: None, or a place [N,D] for the pooled features of N images, where they are to be kept.
    """

    def __init__(
        self, dims: Mapping[FeatureKind, int], split_size: int = 0, points: NDArray[np.float32] | None = None
    ):
        self.count = 0
        self.moments = {kind: Moments(dim) for kind, dim in dims.items()}
        self.score = InceptionScore(split_size) if split_size else None
        self._points, self._places = points, [np.zeros(0, np.int64)]

    def add(self, features: Features, start: int) -> None:
        """Take in the features of images start, start+1, ... of the set."""
        count = len(features.pool)
        for kind, sums in self.moments.items():
            sums.update(getattr(features, kind.field))
        if self.score is not None:
            self.score.update(features.logits, start)
        if self._points is not None:
            if self.count + count > len(self._points):      # their number was not known
                self._points = np.concatenate([self._points, np.empty_like(self._points, shape=(
                    max(count, len(self._points)), self._points.shape[1]))])
            self._points[self.count : self.count + count] = features.pool
            self._places.append(np.arange(start, start + count))
        self.count += count

    def points(self) -> NDArray[np.float32] | None:
        """The pooled features kept, in the order they came: [N,D]."""
        return None if self._points is None else self._points[: self.count]

    def places(self) -> NDArray[np.int64]:
        """Where the `points` stand in the set: [N]."""
        return np.concatenate(self._places)


def dims_of(features: Features) -> dict[FeatureKind, int]:
    """The kinds of features that an extractor gives, and their dimensions."""
    values = {kind: getattr(features, kind.field) for kind in (POOLED, SPATIAL)}
    return {kind: array.shape[1] for kind, array in values.items() if array is not None}


def check_finite(features: Features, extractor: Extractor, path: str, name: Callable[[int], str]) -> None:
    """:raises UserError: if a feature is NaN or infinite; the message names the first image of the batch that has one.

    :param name: what messages call row i of the batch.
    """
    for field, values in features._asdict().items():        # [B,D]
        if values is not None and not np.isfinite(values.sum(dtype=np.float64)):
            row = int(np.isfinite(values).all(1).argmin())
            raise UserError(
                f"{path}: the {field} features of {name(row)} are not finite: the extractor {extractor.name} "
                f"({extractor.id}) is damaged, or cannot take this image"
            )


# --- over ranks ----------------------------------------------------------------------------------------------------


def moments_over_ranks(moments: Moments) -> Moments:
    """The moments of all ranks' features together; one step of all ranks."""
    total = Moments(len(moments.s))
    n = int(dist.all_reduce_sum(th.tensor(moments.n)))
    s, Q = (dist.all_reduce_sum(th.from_numpy(part.copy())).numpy() for part in (moments.s, moments.Q))
    total.add_sums(n, s, Q)
    return total


def score_over_ranks(score: InceptionScore, classes: int) -> InceptionScore:
    """The score of all ranks' images together; one step of all ranks.

    :param classes: K, which a rank without images could not know.
    """
    last = max(score.chunks, default=-1)
    chunks = int(dist.all_reduce_max(th.tensor(last))) + 1
    sums = np.zeros((chunks, 2 + classes))                  # n, sum p ln p, sum p
    for number, (n, p_log_p, p) in score.chunks.items():
        sums[number] = n, p_log_p, *p
    dist.all_reduce_sum(th.from_numpy(sums))
    total = InceptionScore(score.split_size)
    for number, (n, p_log_p, *p) in enumerate(sums):
        if n:
            total.add(number, int(n), p_log_p, np.array(p))
    return total
