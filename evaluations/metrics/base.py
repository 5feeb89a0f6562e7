"""The interface of a metric: what it needs of images, and how it computes its numbers.

Metrics are light to import (numpy at most), since the command lines list them before torch is there. They know nothing
of files and ranks: the engine passes once over each side's images, adds up what the chosen metrics declare over the
ranks, and hands it to `Metric.measure`.

Shapes: N images of a set, B of a batch, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from evaluations.defaults import NEIGHBOURS, PR_DTYPES, SPLIT_SIZE
from evaluations.metrics.arrays import Array
from evaluations.metrics.points import PointSet, Ranks

STORED, COMPUTED, CACHED = "stored statistics", "images", "cached statistics"
"""Where the mean and covariance of a side come from."""


@dataclass(frozen=True)
class FeatureKind:
    """A kind of features that has a mean and covariance."""

    field: str                                              # output of an extractor: a field of `Features`
    suffix: str                                             # of the keys mu, sigma in a file


POOLED = FeatureKind("pool", "")
SPATIAL = FeatureKind("spatial", "_s")
KINDS = (POOLED, SPATIAL)


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a side's features."""

    mu: Array                                               # [D]
    sigma: Array                                            # [D,D]
    count: int | None                                       # images behind it; None where a file does not say
    source: str                                             # STORED, COMPUTED or CACHED


@dataclass(frozen=True)
class Settings:
    """What a person may choose about the metrics."""

    split_size: int = SPLIT_SIZE                            # images per chunk of the Inception Score
    k: int = NEIGHBOURS                                     # of precision and recall
    pr_dtype: str = PR_DTYPES[0]                            # of the distances of precision and recall
    progress: bool = False                                  # whether long work shows a bar


class Partial(Protocol):
    """What this rank has gathered of the samples: sums, which add up over ranks."""

    def update(self, values: Array, start: int) -> None:
        """Take in the metric's `output` [B,...] for images start, start+1, ... of the set."""

    def sums(self) -> list[NDArray[Any]]:
        """Arrays that add up over ranks; where those of another rank are larger, what is missing counts as 0."""
        ...

    def with_sums(self, sums: list[NDArray[Any]]) -> Partial:
        """One like this with the sums of all ranks."""
        ...


class ClassShare(TypedDict):
    """What a number is for the samples of one class."""

    value: float
    count: int                                              # of its samples


class Number(NamedTuple):
    """A number that a metric gives."""

    value: float
    std: float | None = None                                # over subsets
    clipped: float | None = None                            # share of negative eigenvalues that were set to 0
    warnings: tuple[str, ...] = ()
    by_class: Mapping[str, ClassShare] | None = None        # by name, or by number where there are no names


class Side(Protocol):
    """What a metric may read of the reference or the samples: what it has declared."""

    path: str                                               # what messages call the side
    role: str                                               # "reference images" or "samples"

    @property
    def count(self) -> int:
        """Number of images; 0 for statistics alone."""
        ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class labels of the images, [N], or None."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes; none where they are not known."""
        ...

    @property
    def points(self) -> PointSet:
        """Pooled features of the single images, for a metric with `needs_points`."""
        ...

    def gaussian(self, kind: FeatureKind) -> Gaussian:
        """Mean and covariance, for a metric with `moments`."""
        ...

    def partial(self, metric: Metric) -> Any:
        """What `metric.make_partial` made, after the pass, with the sums of all ranks."""


class Metric:
    """One line of `METRICS`; a new metric overrides what it needs, and `measure`."""

    results: Mapping[str, tuple[str, str]]
    """Key of a result -> its name in Inception's features, and in those of another network."""
    output: str = "pool"
    """The output of the extractor that it is made of: pool, spatial or logits."""
    moments: FeatureKind | None = None
    """The features of both sides whose mean and covariance it compares; stored statistics may give them."""
    needs_points: bool = False
    """Whether it needs the pooled features of single images, of both sides."""
    needs_labels: bool = False
    """Whether it needs the class labels of the samples."""
    of_samples_alone: bool = False
    """Whether the reference plays no part."""
    in_all: bool = True
    """Whether "all" means this one too."""

    def least(self, settings: Settings) -> int:
        """The images that a side must have."""
        return 1

    def make_partial(self, settings: Settings, labels: NDArray[np.int64] | None) -> Partial | None:
        """Empty sums for a pass over the samples; None for a metric that needs none.

        :param labels: of the samples, [N], for a metric with `needs_labels`.
        """
        return None

    def measure(self, ref: Side, sample: Side, settings: Settings, ranks: Ranks) -> dict[str, Number]:
        """The numbers by the keys of `results`; one step of all ranks together, the same numbers on each."""
        raise NotImplementedError

    def reported(self, settings: Settings, smaller: int) -> dict[str, Any]:
        """The settings that its numbers depend on, for the JSON; `smaller` is the size of the smaller set."""
        return {}


def bar(title: str, total: int, unit: str, shown: bool) -> Any:
    """Progress on stderr, see `cm.io.progress`, which is imported late, for the command lines; none unless `shown`."""
    from cm.io.progress import progress

    return progress(None, title, total=total, unit=unit, unit_scale=unit == "pair", shown=shown)
