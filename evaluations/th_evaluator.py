"""Compare samples with a reference on all ranks: the numbers of evaluator.py, for images in an npz or in memory.

mpiexec -n 8 python evaluations/th_evaluator.py VIRTUAL_imagenet64_labeled.npz samples.npz

A rank looks at its share of the images and adds up float64 sums, which alone travel. Precision, recall and KID need
the features themselves: these stay on their ranks too, and blocks of them go round.

Shapes: N images of the set, B of a batch, H and W height and width, D features.
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Parser
from evaluations.flags import th_evaluator_parser


def make_parser() -> Parser:
    return th_evaluator_parser(__doc__.splitlines()[0])


if __name__ == "__main__":                                  # the imports below take seconds
    early_exit.parse_or_exit(make_parser().parse_args)

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch as th
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cm.distributed import setup as dist
from cm.errors import UserError
from cm.logging import logger
from cm.registry import lookup
from evaluations.defaults import BATCH_SIZE, NEIGHBOURS, SPLIT_SIZE
from evaluations.engine.accumulator import (
    POOLED,
    SPATIAL,
    FeatureAccumulator,
    FeatureKind,
    check_finite,
    dims_of,
    moments_over_ranks,
    score_over_ranks,
)
from evaluations.engine.comparison import DAMAGED, KID_SEED, KID_SUBSET_SIZE, KID_SUBSETS, NAMES, OUTPUT_WORDS, Result
from evaluations.engine.image_sets import CACHED, COMPUTED, STORED, Gaussian
from evaluations.engine.over_ranks import Share, kid_over_ranks, precision_recall_over_ranks
from evaluations.engine.readers import BatchFile, Statistics, check_same_size
from evaluations.engine.statistics_cache import StatisticsCache, open_cache
from evaluations.evaluator import DESCRIPTION, make_folder_of, report, versions, write_json
from evaluations.features import Extractor, Features, load_extractor
from evaluations.metrics.frechet import frechet

Batches = Iterable[tuple[int, NDArray[np.uint8]]]           # index in the set of a batch's first image, [B,H,W,3]


@dataclass(frozen=True)
class Need:
    """What a metric is made of."""

    output: str                                             # of the extractor
    kind: FeatureKind | None = None                         # whose mean and covariance it compares
    points: bool = False                                    # whether it needs the features of single images


METRICS = {
    "inception_score": Need("logits"),
    "fid": Need("pool", POOLED),
    "sfid": Need("spatial", SPATIAL),
    "precision_recall": Need("pool", points=True),
    "kid": Need("pool", points=True),
}
FRECHET_KEYS = {POOLED: "frechet_distance", SPATIAL: "spatial_frechet_distance"}


class ThEvaluator:
    """Numbers of images against one reference; the constructor and every method are one step of all ranks together.

    In a training loop, or wherever else images come from a model::

        evaluator = ThEvaluator("ref.npz", load_extractor(), image_size=64, metrics=("fid", "inception_score"))
        results = evaluator.evaluate((start, images) for start, images in this_ranks_batches)
        results["frechet_distance"].value, results["frechet_distance"].label

    Images are uint8, as they would be saved, so a number is the one that evaluator.py gives for the saved file.

    :param ref_path: npz of statistics, or of images, which the ranks measure together, once.
    :param image_size: side of the images to come, or (height, width), in pixels.
    :param metrics: names in `METRICS`; None for all that the extractor and the file allow, with the reasons of the
        others in `skipped`.
    :param batch_size: images of a file per pass and rank.
    :param split_size: images per chunk of the Inception Score.
    :param k: neighbours of precision and recall.
    :param cache: where the statistics of the reference's images are looked for and kept.
    :raises UserError: if the file cannot be used, stores statistics of other features, or a metric that is named
        cannot be had.
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
    ):
        self.extractor, self.batch_size, self.k, self.cache = extractor, batch_size, k, cache
        self.label = label(FRECHET_KEYS[POOLED], extractor)
        file = BatchFile(ref_path)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        # Asked of blank images, so that a rank without any image knows the dimensions too.
        blank = extractor.extract(np.zeros((2, *size, 3), np.uint8))
        self.skipped = self._missing(METRICS if metrics is None else metrics, blank, file)
        if metrics is not None and self.skipped:
            raise UserError("; ".join(f"{name} cannot be computed: {why}" for name, why in self.skipped.items()))
        self.metrics = tuple(name for name in (METRICS if metrics is None else metrics) if name not in self.skipped)
        needs = [METRICS[name] for name in self.metrics]
        given = dims_of(blank)
        self.dim, self.classes = given[POOLED], 0 if blank.logits is None else blank.logits.shape[1]
        self.dims = {need.kind: given[need.kind] for need in needs if need.kind}
        self.keeps_points = any(need.points for need in needs)
        self.split_size = split_size if "inception_score" in self.metrics else 0
        self.ref_points: Share | None = None
        self.reference = self._read(file, tuple(size))

    def evaluate(self, batches: Batches, expected: int = 0) -> dict[str, Result]:
        """The numbers of the images of all ranks; the same on every rank, keys as in `comparison.NAMES`.

        :param batches: this rank's share, possibly none: pairs of a batch's place in the whole set (the index of its
            first image, which decides the chunk of the Inception Score) and its images, uint8 [B,H,W,3].
        :param expected: how many images this rank's share has, if that is known: it saves memory where features are
            kept (precision, recall, KID).
        :raises UserError: if a feature is not finite, or all ranks together have too few images.
        """
        accumulator = self._tally("the images", batches, self.dims, self.split_size, expected)
        count = int(dist.all_reduce_sum(th.tensor(accumulator.count)))
        least = max([2, *([self.k + 1] if "precision_recall" in self.metrics else [])])
        if count < least:
            raise UserError(f"{count} images are too few: {', '.join(self.metrics)} need at least {least} images")
        points = self._share_of(accumulator, count) if self.keeps_points else None
        results = {}
        for name in self.metrics:
            if METRICS[name].kind:
                self._distance(results, METRICS[name].kind, accumulator)
            elif name == "inception_score":
                score = score_over_ranks(accumulator.score, self.classes).finalize()
                results[name] = self._result(name, score, count, of_samples_alone=True)
            elif name == "precision_recall":
                precision, recall = precision_recall_over_ranks(self.ref_points, points, self.k)
                results["precision"] = self._result("precision", precision, count)
                results["recall"] = self._result("recall", recall, count)
            else:
                subset = min(KID_SUBSET_SIZE, count, self.ref_points.count)
                distance = kid_over_ranks(self.ref_points, points, KID_SUBSETS, subset, KID_SEED)
                results["kernel_distance"] = self._result("kernel_distance", distance.mean, count, distance.std)
        return results

    def evaluate_file(self, path: str) -> dict[str, Result]:
        """The numbers of the images (arr_0) of an npz.

        :raises UserError: if the file cannot be used, besides what `evaluate` raises.
        """
        file = BatchFile(path)
        return self.evaluate(self._part_of(file), self._expected(file))

    def warn_of_few(self, num_images: int) -> None:
        """Say so if a distance of that many images is badly biased."""
        if self.dims and num_images < max(self.dims.values()):
            logger.warn(too_few(num_images, max(self.dims.values())))

    # --- inside ----------------------------------------------------------------------------------------------------

    def _missing(self, names: Iterable[str], blank: Features, file: BatchFile) -> dict[str, str]:
        """The metrics that cannot be had, and why."""
        reasons = {}
        for name in names:
            need = lookup(METRICS, name, "metric")
            if getattr(blank, need.output) is None:
                reasons[name] = f"{self.extractor.name} gives no {OUTPUT_WORDS[need.output]}"
            elif need.points and not file.has_images:
                reasons[name] = f"it needs images (arr_0), and {file.path} holds only statistics"
            elif need.points and len(file) <= self.k:
                reasons[name] = f"it needs more than {self.k} images, and {file.path} has {len(file)}"
        return reasons

    def _read(self, file: BatchFile, size: tuple[int, int]) -> dict[FeatureKind, Gaussian]:
        """The reference: what the file stores, what the cache knows, and the rest from its images."""
        found = {}
        for kind, dim in self.dims.items():
            statistics, source = file.statistics(kind.suffix), STORED
            if statistics is None and self.cache is not None:
                known = dist.on_main(self.cache.load, file.path, self.extractor.id, kind.suffix)
                statistics, source = known, CACHED
            if statistics is not None:
                check_features(file.path, statistics, self.extractor, dim)
                found[kind] = Gaussian(statistics.mu, statistics.sigma, statistics.num_images, source)
        missing = {kind: dim for kind, dim in self.dims.items() if kind not in found}
        if not missing and not self.keeps_points:
            return found
        if file.has_images and len(file) < 2:
            raise UserError(f"the reference {file.path} has 1 image; a covariance needs at least 2")
        if file.has_images:
            check_same_size({file.path: file.image_shape[1:3], "the images to come": size})
        accumulator = self._tally(file.path, self._part_of(file), missing, expected=self._expected(file))
        for kind in missing:
            moments = moments_over_ranks(accumulator.moments[kind])
            found[kind] = Gaussian(*moments.finalize(), moments.n, COMPUTED)
            if self.cache is not None:
                statistics = Statistics(*found[kind][:2], self.extractor.id, moments.n)
                dist.on_main(self.cache.save, file.path, statistics, kind.suffix)
        if self.keeps_points:
            self.ref_points = self._share_of(accumulator, len(file))
        return found

    def _part_of(self, file: BatchFile) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """This rank's batches of a file; the ranks take turns, so a batch is the same on any number of them."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        with tqdm(total=len(file), desc=f"features of {file.path}", unit="img", disable=rank > 0) as bar:
            for number, images in enumerate(file.batches(self.batch_size)):
                if number % ranks == rank:
                    yield number * self.batch_size, images
                bar.update(len(images))

    def _expected(self, file: BatchFile) -> int:
        """How many images of a file are this rank's, at most."""
        numbers = range(dist.get_rank(), -(-len(file) // self.batch_size), dist.get_world_size())
        return len(numbers) * self.batch_size

    def _tally(
        self, what: str, batches: Batches, dims: dict[FeatureKind, int], split_size: int = 0, expected: int = 0
    ) -> FeatureAccumulator:
        """What the extractor sees in batches; `expected` images, if their number is known."""
        points = np.empty((expected, self.dim), np.float32) if self.keeps_points else None
        accumulator = FeatureAccumulator(dims, split_size, points)
        for start, images in batches:
            features = self.extractor.extract(images)
            check_finite(features, self.extractor, what, lambda row, start=start: f"image {start + row}")
            accumulator.add(features, start)
        return accumulator

    def _share_of(self, accumulator: FeatureAccumulator, count: int) -> Share:
        return Share(accumulator.points(), accumulator.places(), count)

    def _distance(self, results: dict[str, Result], kind: FeatureKind, accumulator: FeatureAccumulator) -> None:
        key, reference = FRECHET_KEYS[kind], self.reference[kind]
        moments = moments_over_ranks(accumulator.moments[kind])
        parts = dist.on_main(frechet, reference.mu, reference.sigma, *moments.finalize())
        if parts.clipped > DAMAGED:
            logger.warn("a covariance of the reference has negative eigenvalues: its statistics are damaged")
        results[key] = Result(
            parts.distance, label(key, self.extractor), self.extractor.id, moments.n, COMPUTED, reference.count,
            reference.source, resize=self.extractor.resize, clipped=parts.clipped,
        )

    def _result(
        self, key: str, value: float, count: int, std: float | None = None, *, of_samples_alone: bool = False
    ) -> Result:
        reference = () if of_samples_alone else (self.ref_points.count, COMPUTED)
        return Result(value, label(key, self.extractor), self.extractor.id, count, COMPUTED, *reference, std=std,
                      resize=self.extractor.resize)


def label(key: str, extractor: Extractor) -> str:
    """FID and the like in Inception's features, and plain names in those of another network."""
    famous, plain = NAMES[key]
    return famous if extractor.is_inception else f"{plain} ({extractor.name} features, not Inception)"


def too_few(num_images: int, dim: int) -> str:
    return (f"{num_images} images are fewer than the {dim} feature dimensions, so their distance is strongly biased; "
            "compare it only at equal counts")


def check_features(path: str, stored: Statistics, extractor: Extractor, dim: int) -> None:
    """:raises UserError: if the statistics of a file are not of this extractor's `dim` features."""
    if len(stored.mu) != dim or stored.extractor not in (None, extractor.id):
        raise UserError(
            f"{path} stores {len(stored.mu)} features of {stored.extractor or 'an extractor it does not name'}, and "
            f"the extractor given is {extractor.id} with {dim}: give the one that the statistics come from"
        )


# --- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    dist.setup_dist()
    start = time.monotonic()
    make_folder_of(args.json)
    samples = BatchFile(args.sample_batch)
    if not samples.has_images:
        raise UserError(f"{samples.path} holds only statistics, no images (arr_0)")
    evaluator = ThEvaluator(
        args.ref_batch, load_extractor(args.inception, dist.dev()), samples.image_shape[1:3],
        metrics=None if args.metrics == "all" else [name.strip() for name in args.metrics.split(",")],
        batch_size=args.batch_size, split_size=args.split_size, k=args.k, cache=open_cache(args.cache),
    )
    results = evaluator.evaluate_file(args.sample_batch)
    result = {
        "metrics": {key: asdict(each) for key, each in results.items()},
        "skipped": evaluator.skipped,
        "warnings": [too_few(len(samples), dim) for dim in evaluator.dims.values() if len(samples) < dim],
        "extractor": {name: getattr(evaluator.extractor, name) for name in DESCRIPTION},
        "reference": args.ref_batch,
        "samples": args.sample_batch,
        "settings": {"split_size": args.split_size, "k": args.k, "kid_subsets": KID_SUBSETS, "kid_seed": KID_SEED,
                     "ranks": dist.get_world_size()},
        "versions": versions(),
        "seconds": round(time.monotonic() - start, 3),
    }
    if dist.is_main():
        print(report(result))
        write_json(args.json, result)


if __name__ == "__main__":
    dist.run(main)
