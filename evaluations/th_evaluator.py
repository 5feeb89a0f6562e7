"""Compare samples with a reference on all ranks. The numbers are those of evaluator.py; images may be in memory.

mpiexec -n 8 python evaluations/th_evaluator.py VIRTUAL_imagenet64_labeled.npz samples.npz

Each rank computes the features of its share of the images, and the ranks exchange only float64 sums. Precision, recall
and KID need the features themselves: each rank keeps its own and broadcasts them in blocks.

Shapes: N images of the set, B of a batch, H and W height and width, D features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cm.config.parser import Parser
from evaluations import command
from evaluations.defaults import BATCH_SIZE, NEIGHBOURS, PR_DTYPES, SPLIT_SIZE
from evaluations.flags import asked_metrics, th_evaluator_parser
from evaluations.metrics.base import FeatureKind, Gaussian, Settings
from evaluations.report import report

if TYPE_CHECKING:                                           # what takes seconds to import is imported when it is used
    from evaluations.engine.images import Batches
    from evaluations.engine.results import Measured, Result
    from evaluations.engine.statistics_cache import StatisticsCache
    from evaluations.features import Extractor

__all__ = ["ThEvaluator", "main", "make_parser"]


def __getattr__(name: str) -> Any:
    """openai/consistency_models' classes, from `evaluations.compat` when they are asked for."""
    from evaluations import compat

    return getattr(compat, name)


def make_parser() -> Parser:
    """The flags of this command."""
    return th_evaluator_parser("Compare a batch of samples with a reference batch, on all ranks of a job.")


class ThEvaluator:
    """Compares images with one reference. All ranks must call the constructor and every method.

    Use it in a training loop, or wherever a model generates images::

        evaluator = ThEvaluator("ref.npz", load_extractor(), image_size=64, metrics=("fid", "inception_score"))
        results = evaluator.evaluate((start, images) for start, images in this_ranks_batches)
        results["frechet_distance"].value, results["frechet_distance"].label

    Images are uint8, as they would be saved, so the numbers are those that evaluator.py gives for the saved file.

    :param ref_path: npz of statistics, or of images, whose features the ranks compute once.
    :param image_size: side of the images to evaluate, or (height, width), in pixels.
    :param metrics: names in `METRICS`; None: all that the extractor and the file allow, with the reasons for the others
        in `skipped`.
    :param batch_size: images of a file per pass and rank.
    :param split_size: images per split of the Inception Score.
    :param k: number of nearest neighbours for precision and recall.
    :param cache: the cache for statistics of the reference's images.
    :param pr_dtype: dtype of the distances for precision and recall, a name in `PR_DTYPES`.
    :param progress: whether rank 0 shows progress bars.
    :raises UserError: if the file cannot be used, stores statistics of other features, sizes or resize rules, or a
        metric that is named cannot be computed.
    """

    def __init__(
        self,
        ref_path: str,
        extractor: Extractor,
        image_size: int | tuple[int, int],
        *,
        metrics: Sequence[str] | None = ("fid",),
        batch_size: int = BATCH_SIZE,
        split_size: int = SPLIT_SIZE,
        k: int = NEIGHBOURS,
        cache: StatisticsCache | None = None,
        pr_dtype: str = PR_DTYPES[0],
        progress: bool = True,
    ):
        from evaluations.engine.one_reference import OneReference

        self._comparison = OneReference(
            ref_path, extractor, (image_size, image_size) if isinstance(image_size, int) else image_size, metrics,
            Settings(split_size, k, pr_dtype, progress), batch_size, cache,
        )
        self.extractor = extractor
        self.label = self._comparison.label
        """The name of the Frechet distance of pooled features in a log."""
        self.skipped: dict[str, str] = self._comparison.skipped
        """The metrics that cannot be computed, and why."""
        self.metrics: tuple[str, ...] = tuple(self._comparison.engine.metrics)
        """The names of the metrics that are computed."""
        self.dims: dict[FeatureKind, int] = self._comparison.dims
        """Dimensions of the features whose mean and covariance are compared."""

    @property
    def reference(self) -> dict[FeatureKind, Gaussian]:
        """Mean and covariance of the reference, by kind of features."""
        return self._comparison.ref.gaussians

    def evaluate(self, batches: Batches, expected: int = 0) -> dict[str, Result]:
        """The results for the images of all ranks; the same on every rank, with the keys of the metrics' `results`.

        :param batches: this rank's share, which may be empty: pairs of the index of a batch's first image in the
            complete set, which decides the split of the Inception Score, and the images, uint8 [B,H,W,3].
        :param expected: number of images of this rank's share, if known; this saves memory for metrics that keep
            features (precision, recall, KID).
        :raises UserError: on every rank, if a feature is not finite, or all ranks together have too few images.
        """
        return self._comparison.logged(self._comparison.of_batches(batches, expected)).results

    def evaluate_file(self, path: str) -> dict[str, Result]:
        """The results for the images (arr_0) of an npz.

        :raises UserError: if the file cannot be used, and as `evaluate`.
        """
        return self._comparison.logged(self.measure_file(path)).results

    def measure_file(self, path: str) -> Measured:
        """As `evaluate_file`; warnings about unreliable numbers are returned instead of logged.

        :raises UserError: as `evaluate_file`.
        """
        return self._comparison.of_file(path)

    def reported(self, num_samples: int) -> dict[str, object]:
        """The settings that the results of `num_samples` samples depend on, for the JSON file."""
        return self._comparison.engine.reported(min(self._comparison.ref.count, num_samples))

    def warn_of_few(self, num_images: int) -> None:
        """Log a warning if the distance of so few images is strongly biased."""
        from cm.logging import logger
        from evaluations.engine.results import too_few

        largest = max(self.dims.values(), default=0)
        if num_images < largest:
            logger.warn(too_few(num_images, largest))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in this process."""
    _run(make_parser().parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    from cm.distributed import setup as dist
    from cm.io.storage import write_json
    from cm.io.terminal import without_controls
    from evaluations.engine.readers import BatchFile
    from evaluations.engine.results import as_json
    from evaluations.engine.statistics_cache import open_cache
    from evaluations.features import load_extractor
    from evaluations.metrics import default_names

    dist.setup_dist(device=args.device)
    start_time = time.monotonic()
    command.prepare_output(args, "--json", "ref_batch", "sample_batch")
    samples, names = BatchFile(args.sample_batch), asked_metrics(args)
    samples.check_has_images()
    assert samples.image_shape is not None
    extractor = load_extractor(args.inception, dist.dev(), trusted=args.trust_extractor)
    evaluator = ThEvaluator(
        args.ref_batch, extractor, samples.image_shape[1:3],
        metrics=None if names == default_names() else names, batch_size=args.batch_size, split_size=args.split_size,
        k=args.k, pr_dtype=args.pr_dtype, cache=open_cache(args.cache),
    )
    measured = evaluator.measure_file(args.sample_batch)
    result = as_json(measured, evaluator.skipped, evaluator.extractor, args.ref_batch, args.sample_batch,
                     evaluator.reported(len(samples)), time.monotonic() - start_time)
    if dist.is_main():
        print(without_controls(report(result)))
    if args.json:
        dist.on_main(write_json, args.json, result)


if __name__ == "__main__":
    command.start(make_parser, _run)
