"""One side of a comparison: what a file stores, and what one pass of the extractor over its images adds.

Shapes: N images of the set, B of a batch, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from evaluations.engine.accumulator import POOLED, SPATIAL, FeatureAccumulator, FeatureKind, check_finite, dims_of
from evaluations.engine.readers import BatchFile, Statistics
from evaluations.engine.statistics_cache import StatisticsCache
from evaluations.features import Extractor, Features

STORED, COMPUTED, CACHED = "stored statistics", "images", "cached statistics"


class Unavailable(Exception):
    """Why a metric cannot be computed from these files with this extractor."""


class Gaussian(NamedTuple):
    mu: NDArray[np.float64]                                 # [D]
    sigma: NDArray[np.float64]                              # [D,D]
    count: int | None                                       # images behind it; None where a file does not say
    source: str                                             # STORED, COMPUTED or CACHED


class ImageSet:
    """The reference or the samples.

    The metrics say with `want_*` what they will read, `extract` passes once over the images (or not at all, if what
    the file stores is enough), and then the metrics read.
    """

    def __init__(self, path: str, role: str):
        self.file = BatchFile(path)
        self.path, self.role = self.file.path, role
        self.stored = {kind: self.file.statistics(kind.suffix) for kind in (POOLED, SPATIAL)}
        self.cached: dict[FeatureKind, Statistics] = {}
        self.accumulator: FeatureAccumulator | None = None
        self.labels: NDArray[np.int64] | None = None
        self.correct = 0
        self.points: NDArray[np.float32] | None = None      # pooled features [N,D]
        self._wants_moments: set[FeatureKind] = set()
        self._split_size = 0
        self._wants_points = False

    def __len__(self) -> int:
        return len(self.file)

    # --- what the metrics will read --------------------------------------------------------------------------------

    def check_images(self) -> None:
        """:raises Unavailable: without images."""
        if not self.file.has_images:
            raise Unavailable(f"it needs images (arr_0), and {self.path} holds only statistics")

    def check_gaussian(self, kind: FeatureKind) -> None:
        """:raises Unavailable: if neither stored statistics nor images can give a mean and covariance."""
        if self.stored[kind] is None and len(self) < 2:
            raise Unavailable(f"it needs mu{kind.suffix} and sigma{kind.suffix} or at least 2 images; "
                              f"{self.path} has {len(self)} images and no such statistics")

    def want_gaussian(self, kind: FeatureKind) -> None:
        if self.stored[kind] is None:
            self._wants_moments.add(kind)

    def want_points(self) -> None:
        self._wants_points = True

    def want_score(self, split_size: int) -> None:
        self._split_size = split_size

    def want_accuracy(self) -> None:
        """:raises Unavailable: without labels."""
        self.labels = self.file.labels()
        if self.labels is None:
            raise Unavailable(f"it needs class labels (arr_1), and {self.path} has none")

    @property
    def needs_extractor(self) -> bool:
        return bool(self._wants_moments or self._wants_points or self._split_size or self.labels is not None)

    def look_up(self, cache: StatisticsCache, extractor: Extractor) -> None:
        """Take from the cache what is wanted and there."""
        for kind in self._wants_moments:
            found = cache.load(self.path, extractor.id, kind.suffix)
            if found is not None:
                self.cached[kind] = found
        self._wants_moments -= set(self.cached)

    # --- the pass over the images ----------------------------------------------------------------------------------

    def extract(
        self, extractor: Extractor, probe: Features, batch_size: int, progress: bool, cache: StatisticsCache | None
    ) -> None:
        """Pass once over the images and keep what is wanted, in the cache too.

        :param probe: the extractor's outputs for a few images.
        :raises UserError: if a feature is not finite.
        """
        given = dims_of(probe)
        self.accumulator = FeatureAccumulator(
            {kind: given[kind] for kind in self._wants_moments if kind in given},
            self._split_size if probe.logits is not None else 0,
            np.empty((len(self), given[POOLED]), np.float32) if self._wants_points else None,
        )
        with tqdm(total=len(self), desc=f"features of the {self.role}", unit="img", disable=not progress) as bar:
            for images in self.file.batches(batch_size):
                start = self.accumulator.count
                features = extractor.extract(images)
                check_finite(features, extractor, self.path, lambda row, start=start: f"image {start + row}")
                self.accumulator.add(features, start)
                if self.labels is not None and features.logits is not None:
                    labels = self.labels[start : start + len(images)]
                    self.correct += int((features.logits.argmax(1) == labels).sum())
                bar.update(len(images))
        self.points = self.accumulator.points()
        if cache is not None and len(self) > 1:
            for kind, moments in self.accumulator.moments.items():
                cache.save(self.path, Statistics(*moments.finalize(), extractor.id, moments.n), kind.suffix)

    # --- what the metrics read -------------------------------------------------------------------------------------

    def gaussian(self, kind: FeatureKind) -> Gaussian:
        """Stored statistics where the file has them, else those of its images."""
        stored = self.stored[kind]
        if stored is not None:
            return Gaussian(stored.mu, stored.sigma, stored.num_images, STORED)
        if kind in self.cached:
            cached = self.cached[kind]
            return Gaussian(cached.mu, cached.sigma, cached.num_images, CACHED)
        moments = self.accumulator.moments[kind]
        return Gaussian(*moments.finalize(), moments.n, COMPUTED)
