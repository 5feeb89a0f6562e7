"""One side of a comparison: the statistics stored in a file, and those of one pass of the extractor over its images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm.data.class_names import ClassNames
from evaluations.engine.accumulator import Gathered
from evaluations.engine.image_files import NpzPictures
from evaluations.engine.images import FileImages, Images
from evaluations.engine.readers import BatchFile, Statistics
from evaluations.metrics.base import KINDS, STORED, FeatureKind, Gaussian, Metric, Settings
from evaluations.metrics.points import PointSet

REFERENCE, SAMPLES = "reference images", "samples"          # roles


class Side:
    """The reference or the samples.

    :param path: what messages call it.
    :param role: REFERENCE or SAMPLES.
    :param images: None for statistics alone.
    :param stored: the statistics that a file holds.
    :param class_names: of the file, for statistics alone; images know their own.
    :param choice: which of the images at the path these are, where not all are meant; part of a cache entry's name.
    """

    def __init__(
        self, path: str, role: str, images: Images | None,
        stored: Mapping[FeatureKind, Statistics] | None = None, choice: str = "", class_names: ClassNames = (),
    ):
        self.path, self.role, self.images, self.choice = path, role, images, choice
        self.stored = dict(stored or {})
        self.gaussians = {
            kind: Gaussian(each.mu, each.sigma, each.num_images, STORED) for kind, each in self.stored.items()
        }
        self._class_names = class_names
        self._count: int | None = None
        self._points: PointSet | None = None
        self._partials: dict[Metric, Any] = {}

    @property
    def is_in_files(self) -> bool:
        """Whether the images can be read again, so that what they gave is worth keeping."""
        return isinstance(self.images, FileImages)

    # --- before the pass -------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Number of images; 0 for statistics alone."""
        if self._count is not None:
            return self._count
        return 0 if self.images is None else len(self.images)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class labels of the images, [N], or None."""
        return None if self.images is None else self.images.labels

    @property
    def class_names(self) -> ClassNames:
        """The names of the classes; none where they are not known."""
        return self._class_names if self.images is None else self.images.class_names

    def reason_against(self, metric: Metric, settings: Settings) -> str | None:
        """Why a metric cannot be computed from what this side holds, or None."""
        has_images, least = self.images is not None, metric.least(settings)
        if metric.moments is not None and metric.moments not in self.stored and self.count < least:
            suffix = metric.moments.suffix
            return (f"it needs mu{suffix} and sigma{suffix} or at least {least} images; {self.path} has {self.count} "
                    "images and no such statistics")
        if metric.moments is not None and not metric.needs_points:
            return None
        if not has_images:
            return f"it needs images (arr_0), and {self.path} holds only statistics"
        if self.count < least:
            return f"it needs more than {least - 1} images on each side, and {self.path} has {self.count}"
        if metric.needs_labels and self.role == SAMPLES and self.labels is None:
            return f"it needs class labels (arr_1), and {self.path} has none"
        return None

    def takes_pass(self, metrics: Iterable[Metric]) -> bool:
        """Whether the extractor must see this side's images for one of these metrics."""
        return any(
            metric.needs_points or metric.moments is not None and metric.moments not in self.gaussians
            or metric.moments is None and self.role == SAMPLES for metric in metrics
        )

    # --- the pass --------------------------------------------------------------------------------------------------

    def take(self, gathered: Gathered) -> None:
        """Keep what a pass over the images has left, but for moments."""
        self._count, self._points, self._partials = gathered.count, gathered.points, gathered.partials

    # --- what the metrics read -------------------------------------------------------------------------------------

    @property
    def points(self) -> PointSet:
        """Pooled features of the single images."""
        assert self._points is not None, f"no features of {self.path} were kept"
        return self._points

    def gaussian(self, kind: FeatureKind) -> Gaussian:
        """Stored statistics where the file has them, else those of its images."""
        return self.gaussians[kind]

    def partial(self, metric: Metric) -> Any:
        """The sums of `metric`, of all ranks."""
        return self._partials[metric]


def side_of_file(path: str, role: str) -> Side:
    """A side that is an npz of images, statistics or both.

    :raises UserError: if the file cannot be used.
    """
    file = BatchFile(path)
    images = FileImages(NpzPictures(file)) if file.has_images else None
    return Side(file.path, role, images, stored_in(file), class_names=file.class_names())


def stored_in(file: BatchFile, kinds: Iterable[FeatureKind] = KINDS) -> dict[FeatureKind, Statistics]:
    """The statistics that an npz holds.

    :raises UserError: if they are unusable.
    """
    found = {kind: file.statistics(kind.suffix) for kind in kinds}
    return {kind: statistics for kind, statistics in found.items() if statistics is not None}
