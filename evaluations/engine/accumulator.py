"""The results of one pass of an extractor over a side's images: sums, and the points of the metrics that need them.

Shapes: N images of the set, n of them on this rank, B of a batch, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm.errors import UserError
from evaluations.engine.images import Images
from evaluations.engine.ranks import agree, over_ranks
from evaluations.features.base import Extractor, Features
from evaluations.metrics.arrays import Array
from evaluations.metrics.base import KINDS, FeatureKind, Metric, Partial, bar
from evaluations.metrics.frechet import Moments
from evaluations.metrics.points import PointSet, Ranks


@dataclass
class Wanted:
    """What a pass is to leave.

    :param dims: the kinds of features whose mean and covariance are wanted, and their dimensions.
    :param partials: the empty sums of metrics.
    :param point_dim: D of the pooled features of single images, where they are wanted; else 0.
    """

    dims: Mapping[FeatureKind, int]
    partials: Mapping[Metric, Partial] = field(default_factory=dict)
    point_dim: int = 0

    def __bool__(self) -> bool:
        return bool(self.dims or self.partials or self.point_dim)


@dataclass
class Gathered:
    """The statistics of a pass, over the images of all ranks."""

    count: int                                              # N
    moments: dict[FeatureKind, Moments]
    partials: dict[Metric, Any]
    points: PointSet | None


class FeatureAccumulator:
    """Running float64 sums of the features of this rank's images, and where asked for the pooled features themselves.

    :param expected: n, as far as it is known: it saves memory where features are kept.
    """

    def __init__(self, wanted: Wanted, expected: int = 0):
        self.count = 0
        self.moments = {kind: Moments(dim) for kind, dim in wanted.dims.items()}
        self.partials = dict(wanted.partials)
        self._points = np.empty((expected, wanted.point_dim), np.float32) if wanted.point_dim else None
        self._places = [np.zeros(0, np.int64)]

    def add(self, features: Features, start: int) -> None:
        """Take in the features of images start, start+1, ... of the set."""
        count = len(features.pool)
        for kind, sums in self.moments.items():
            sums.update(output_of(features, kind.field), start)
        for metric, partial in self.partials.items():
            partial.update(output_of(features, metric.output), start)
        if self._points is not None:
            if self.count + count > len(self._points):      # their number was not known
                more = np.empty((max(count, len(self._points)), self._points.shape[1]), np.float32)
                self._points = np.concatenate([self._points, more])
            self._points[self.count : self.count + count] = features.pool
            self._places.append(np.arange(start, start + count))
        self.count += count

    def over_ranks(self, ranks: Ranks) -> Gathered:
        """The statistics of all ranks; points stay on their rank. All ranks must call it together."""
        count = int(ranks.sum(np.array(self.count)))
        points = None
        if self._points is not None:
            points = PointSet(self._points[: self.count], np.concatenate(self._places), count, ranks)
        return Gathered(
            count, {kind: over_ranks(sums, ranks) for kind, sums in self.moments.items()},
            {metric: over_ranks(partial, ranks) for metric, partial in self.partials.items()}, points,
        )


def pass_over(
    images: Images, extractor: Extractor, wanted: Wanted, batch_size: int, ranks: Ranks, progress: bool
) -> Gathered:
    """Show every image of a set to the extractor once, each rank its share. All ranks must call it together.

    :raises UserError: on every rank, if an image cannot be read or a feature is not finite.
    """
    accumulator, error = FeatureAccumulator(wanted, images.expected(batch_size, ranks)), None
    try:
        visible = progress and ranks.rank == 0 and len(images) > 0             # what makes images has bars of its own
        with bar(f"features of {images.path}", len(images), "img", visible) as shown:
            for start, batch, done in images.batches(batch_size, ranks):
                if error is None:                           # after one, go on: others may wait for what makes images
                    error = _take_in(accumulator, images, extractor, start, batch)
                shown.update(done)
    except UserError as unreadable:
        error = error or unreadable
    agree(ranks, error)
    return accumulator.over_ranks(ranks)


def _take_in(
    accumulator: FeatureAccumulator, images: Images, extractor: Extractor, start: int, batch: NDArray[np.uint8]
) -> UserError | None:
    try:
        features = extractor.extract(batch)
        check_finite(features, extractor, images.path, lambda row: images.name(start + row))
        accumulator.add(features, start)
    except UserError as error:
        return error
    return None


def output_of(features: Features, name: str) -> Array:
    """An output that is there: [B,...]."""
    values = getattr(features, name)
    assert values is not None, f"the extractor gives no {name}"
    return values


def dims_of(features: Features) -> dict[FeatureKind, int]:
    """The kinds of features that an extractor gives, and their dimensions."""
    values = {kind: getattr(features, kind.field) for kind in KINDS}
    return {kind: array.shape[1] for kind, array in values.items() if array is not None}


def check_finite(features: Features, extractor: Extractor, path: str, name: Callable[[int], str]) -> None:
    """:raises UserError: if a feature is NaN or infinite; the message names the first image of the batch that has one.

    :param name: what messages call row i of the batch.
    """
    for field_name, values in features._asdict().items():   # [B,D]
        if values is not None and not np.isfinite(values.sum(dtype=np.float64)):
            row = int(np.isfinite(values).all(1).argmin())
            raise UserError(
                f"{path}: the {field_name} features of {name(row)} are not finite: the extractor {extractor.name} "
                f"({extractor.id}) is damaged, or cannot take this image"
            )
