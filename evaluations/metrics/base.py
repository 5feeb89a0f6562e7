"""The interface of a metric: the statistics that it needs, and the computation of its numbers.

Metrics import nothing slower than numpy, since the command lines list them before torch is imported. They do not handle
files or ranks: the engine passes once over the images of each side, sums the statistics that the chosen metrics
declare over the ranks, and calls `Metric.measure` with them.

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
"""The possible sources of the mean and covariance of a side."""


@dataclass(frozen=True)
class FeatureKind:
    """A kind of features that has a mean and covariance."""

    field: str                                              # output of an extractor: a field of `Features`
    suffix: str                                             # appended to the keys mu and sigma in a file


POOLED = FeatureKind("pool", "")
SPATIAL = FeatureKind("spatial", "_s")
KINDS = (POOLED, SPATIAL)


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of the features of a side."""

    mu: Array                                               # [D]
    sigma: Array                                            # [D,D]
    count: int | None                                       # number of images; None if a file does not have it
    source: str                                             # STORED, COMPUTED or CACHED


@dataclass(frozen=True)
class Settings:
    """The settings of metrics that a user may choose."""

    split_size: int = SPLIT_SIZE                            # images per chunk of the Inception Score
    k: int = NEIGHBOURS                                     # nearest neighbours for precision and recall
    pr_dtype: str = PR_DTYPES[0]                            # dtype of distances for precision and recall
    progress: bool = False                                  # whether to show progress bars


class Partial(Protocol):
    """Sums over the samples of this rank, which can be added over the ranks."""

    def update(self, values: Array, start: int) -> None:
        """Add the metric's `output` [B,...] for images start, start+1, ... of the set."""

    def sums(self) -> list[NDArray[Any]]:
        """Arrays to add over the ranks. If an array of another rank is larger, missing elements count as 0."""
        ...

    def with_sums(self, sums: list[NDArray[Any]]) -> Partial:
        """A copy with the sums of all ranks."""
        ...


class ClassShare(TypedDict):
    """A number for the samples of one class."""

    value: float
    count: int                                              # number of samples of the class


class Number(NamedTuple):
    """A result of a metric."""

    value: float
    std: float | None = None                                # standard deviation over subsets
    clipped: float | None = None                            # share of negative eigenvalues that were set to 0
    warnings: tuple[str, ...] = ()
    by_class: Mapping[str, ClassShare] | None = None        # by name, or by number where there are no names


class Side(Protocol):
    """The statistics of the reference or the samples that a metric may read: those that it has declared."""

    path: str                                               # name of the side in messages
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
        """The names of the classes; empty if they are not known."""
        ...

    @property
    def points(self) -> PointSet:
        """Pooled features of the single images, for a metric with `needs_points`."""
        ...

    def gaussian(self, kind: FeatureKind) -> Gaussian:
        """Mean and covariance, for a metric with `moments`."""
        ...

    def partial(self, metric: Metric) -> Any:
        """The object from `metric.make_partial` after the pass, with the sums of all ranks."""


class Metric:
    """The base class of metrics. A subclass defines `results` and `measure`, and overrides what differs."""

    results: Mapping[str, tuple[str, str]]
    """Key of a result -> its name in Inception's features, and in those of another network."""
    output: str = "pool"
    """The output of the extractor that `make_partial` uses: pool, spatial or logits."""
    moments: FeatureKind | None = None
    """The kind of features of which it needs mean and covariance on both sides; stored statistics may have them."""
    needs_points: bool = False
    """Whether it needs the pooled features of single images on both sides."""
    needs_labels: bool = False
    """Whether it needs the class labels of the samples."""
    of_samples_alone: bool = False
    """Whether it does not use the reference."""
    in_all: bool = True
    """Whether it is part of "--metrics all"."""

    def least(self, settings: Settings) -> int:
        """The least number of images of a side."""
        return 1

    def make_partial(self, settings: Settings, labels: NDArray[np.int64] | None) -> Partial | None:
        """Empty sums for a pass over the samples; None if the metric needs none.

        :param labels: class labels of the samples, [N], if the metric `needs_labels`.
        """
        return None

    def measure(self, ref: Side, sample: Side, settings: Settings, ranks: Ranks) -> dict[str, Number]:
        """The numbers by the keys of `results`, the same on all ranks, which must call it together."""
        raise NotImplementedError

    def reported(self, settings: Settings, smaller: int) -> dict[str, Any]:
        """The settings that the numbers depend on, for the JSON file; `smaller` is the size of the smaller set."""
        return {}


def bar(title: str, total: int, unit: str, shown: bool) -> Any:
    """A progress bar on stderr if `shown`. `cm.io.progress` is imported late, so that --help is fast."""
    from cm.io.progress import progress

    return progress(None, title, total=total, unit=unit, unit_scale=unit == "pair", shown=shown)
