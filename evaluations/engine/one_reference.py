"""One reference, and any number of sets of samples that are compared with it: the work of ThEvaluator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cm.distributed import setup as dist
from cm.errors import UserError
from cm.logging import logger
from evaluations.engine.accumulator import dims_of
from evaluations.engine.agreement import check_features, check_image_sizes
from evaluations.engine.engine import Engine, choose_metrics, refuse_unless
from evaluations.engine.images import Batches, GivenImages
from evaluations.engine.ranks import JobRanks
from evaluations.engine.readers import BatchFile
from evaluations.engine.results import Measured, label
from evaluations.engine.side import REFERENCE, SAMPLES, Side, side_of_file
from evaluations.engine.statistics_cache import StatisticsCache
from evaluations.features.base import Extractor
from evaluations.metrics import METRICS
from evaluations.metrics.base import Settings


class OneReference:
    """A reference that is measured once; all ranks must call the constructor and every method together.

    :param size: (H, W) of the samples to come.
    :param metrics: names in `METRICS`; None for all that can be computed.
    :raises UserError: if the file cannot be used or does not fit, or a metric that is named cannot be computed.
    """

    def __init__(
        self, ref_path: str, extractor: Extractor, size: tuple[int, int], metrics: Sequence[str] | None,
        settings: Settings, batch_size: int, cache: StatisticsCache | None,
    ):
        self.extractor, self.size = extractor, size
        chosen, _ = choose_metrics(metrics)
        engine = Engine(chosen, settings, JobRanks(), batch_size, cache)
        self.ref = side_of_file(ref_path, REFERENCE)
        if self.ref.count == 1 and not self.ref.stored:
            raise UserError(f"the reference {self.ref.path} has 1 image; a covariance needs at least 2")
        # Asked of blank images, so that a rank without any image knows the dimensions too.
        self.blank = extractor.extract(np.zeros((2, *size, 3), np.uint8))
        self.skipped = engine.reasons_from_side(self.ref) | engine.reasons_from_extractor(extractor, self.blank)
        refuse_unless(chosen if metrics is None else (), self.skipped)
        self.engine = engine.without(self.skipped)
        self.dims = {kind: dim for kind, dim in dims_of(self.blank).items() if kind in self.engine.kinds}
        famous_and_plain = next(iter(METRICS["fid"].results.values()))
        self.label = label(famous_and_plain, extractor, extractor.id)
        self._measure_reference()

    def _measure_reference(self) -> None:
        for kind, dim in self.dims.items():
            if kind in self.ref.stored:
                check_features(self.ref.path, self.ref.stored[kind], self.extractor, dim)
        to_come = self._samples((), 0)
        self.engine.check_agreement(self.ref, to_come, self.extractor, self.blank)
        self.engine.look_up(self.ref, self.extractor)
        if self.engine.needs_extractor(self.ref):
            check_image_sizes([self.ref, to_come])
        self.engine.gather(self.ref, self.extractor, self.blank)

    def _samples(self, batches: Batches, expected: int) -> Side:
        return Side("the images to come", SAMPLES, GivenImages(batches, self.size, expected))

    def of_batches(self, batches: Batches, expected: int = 0) -> Measured:
        """The numbers of images as they come; see `ThEvaluator.evaluate`."""
        for name, metric in self.engine.metrics.items():
            if metric.needs_labels:
                raise UserError(f"{name} needs class labels, and images in memory have none: save them as an npz with "
                                "arr_1, and evaluate that file")
        return self._measure(self._samples(batches, expected))

    def of_file(self, path: str) -> Measured:
        """The numbers of the images of an npz."""
        BatchFile(path).check_has_images()
        sample = side_of_file(path, SAMPLES)
        sample.stored, sample.gaussians = {}, {}            # of samples, the images count
        refuse_unless((), self.engine.reasons_from_side(sample) |
                      self.engine.reasons_from_extractor(self.extractor, self.blank, sample))
        check_image_sizes([sample, self._samples((), 0)])
        return self._measure(sample)

    def _measure(self, sample: Side) -> Measured:
        self.engine.look_up(sample, self.extractor)
        self.engine.gather(sample, self.extractor, self.blank)
        return self.engine.measure(self.ref, sample, self.extractor)

    def logged(self, measured: Measured) -> Measured:
        """The same, after its warnings of odd results were logged; few images are warned of once, elsewhere."""
        if dist.is_main():
            for text in measured.odd:
                logger.warn(text)
        return measured
