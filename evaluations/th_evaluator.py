"""The evaluator's numbers on all ranks: images in memory or in an npz against one reference, asked as often as wanted.

mpiexec -n 8 python evaluations/th_evaluator.py VIRTUAL_imagenet64_labeled.npz samples.npz --inception torch

A rank looks at its share of the images and adds up float64 sums, which alone travel; features never leave their rank.

Shapes: N images of the set, B of a batch, H and W height and width, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch as th
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cm import dist_util, logger
from cm.registry import UserError, lookup
from evaluations.comparison import DAMAGED, NAMES, OUTPUT_WORDS, Result
from evaluations.features import Extractor
from evaluations.image_sets import COMPUTED, STORED, Gaussian
from evaluations.metrics import SPLIT_SIZE, frechet
from evaluations.readers import BatchFile, Statistics
from evaluations.tally import (
    POOLED,
    SPATIAL,
    FeatureKind,
    Tally,
    check_finite,
    dims_of,
    moments_over_ranks,
    score_over_ranks,
)

Batches = Iterable[tuple[int, NDArray[np.uint8]]]           # index in the set of a batch's first image, [B,H,W,3]

# metric -> key of its result
FRECHET = {"fid": ("frechet_distance", POOLED), "sfid": ("spatial_frechet_distance", SPATIAL)}
METRICS = {"inception_score": "logits", "fid": "pool", "sfid": "spatial"}              # and what it is made of


class ThEvaluator:
    """Numbers of images against one reference; the constructor and every method are one step of all ranks together.

    In a training loop, or wherever else images come from a model::

        evaluator = ThEvaluator("ref.npz", load_extractor(), image_size=64, metrics=("fid", "inception_score"))
        results = evaluator.evaluate((start, images) for start, images in this_ranks_batches)
        results["frechet_distance"].value, results["frechet_distance"].label

    Images are uint8, as they would be saved, so a number is the one that evaluator.py gives for the saved file.

    :param ref_path: npz of statistics, or of images, which the ranks measure together, once.
    :param image_size: side of the images to come, or (height, width), in pixels.
    :param metrics: names in `METRICS`.
    :param batch_size: images of a file per pass and rank.
    :raises UserError: if the file cannot be used, stores statistics of other features, or the extractor does not give
        what a metric is made of.
    """

    def __init__(
        self,
        ref_path: str,
        extractor: Extractor,
        image_size: int | tuple[int, int],
        *,
        metrics: Sequence[str] = ("fid",),
        batch_size: int = 64,
        split_size: int = SPLIT_SIZE,
    ):
        self.extractor, self.batch_size = extractor, batch_size
        self.label = label("frechet_distance", extractor)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        # Asked of blank images, so that a rank without any image knows the dimensions too.
        blank = extractor.extract(np.zeros((2, *size, 3), np.uint8))
        for name in metrics:
            if getattr(blank, lookup(METRICS, name, "metric")) is None:
                raise UserError(f"{name} cannot be computed: {extractor.name} gives no {OUTPUT_WORDS[METRICS[name]]}")
        self.metrics = tuple(metrics)
        self.dims = {kind: dim for kind, dim in dims_of(blank).items() if self.wants(kind)}
        self.classes = 0 if blank.logits is None else blank.logits.shape[1]
        self.split_size = split_size if "inception_score" in metrics else 0
        self.reference = self._read(BatchFile(ref_path)) if self.dims else {}

    def wants(self, kind: FeatureKind) -> bool:
        return any(FRECHET[name][1] is kind for name in self.metrics if name in FRECHET)

    def evaluate(self, batches: Batches) -> dict[str, Result]:
        """The numbers of the images of all ranks; the same on every rank, keys as in `evaluations.comparison.NAMES`.

        :param batches: this rank's share, possibly none: pairs of a batch's place in the whole set (the index of its
            first image, which decides the chunk of the Inception Score) and its images, uint8 [B,H,W,3].
        :raises UserError: if a feature is not finite, or all ranks together have fewer than 2 images.
        """
        tally = self._tally("the images", batches, self.dims, self.split_size)
        count = int(dist_util.all_reduce_sum(th.tensor(tally.count)))
        if count < 2:
            raise UserError(f"{count} images: a distance needs at least 2")
        results = {}
        for name in self.metrics:
            if name in FRECHET:
                key, kind = FRECHET[name]
                results[key] = self._distance(key, self.reference[kind], tally, kind)
            else:
                score = score_over_ranks(tally.score, self.classes).finalize()
                results[name] = Result(score, label(name, self.extractor), self.extractor.id, count, COMPUTED)
        return results

    def evaluate_file(self, path: str) -> dict[str, Result]:
        """The numbers of the images (arr_0) of an npz.

        :raises UserError: if the file cannot be used, besides what `evaluate` raises.
        """
        return self.evaluate(self._share(BatchFile(path)))

    def warn_of_few(self, num_images: int) -> None:
        """Say so if a distance of that many images is badly biased."""
        for kind in self.dims:
            if num_images < self.dims[kind]:
                logger.warn(too_few(num_images, self.dims[kind]))
                break

    # --- inside ----------------------------------------------------------------------------------------------------

    def _read(self, file: BatchFile) -> dict[FeatureKind, Gaussian]:
        """The reference: what the file stores, and the rest from its images."""
        stored = {kind: file.statistics(kind.suffix) for kind in self.dims}
        found = {}
        for kind, statistics in stored.items():
            if statistics is not None:
                check_features(file.path, statistics, self.extractor, self.dims[kind])
                found[kind] = Gaussian(statistics.mu, statistics.sigma, statistics.num_images, STORED)
        missing = {kind: dim for kind, dim in self.dims.items() if kind not in found}
        if missing:
            if file.has_images and len(file) < 2:
                raise UserError(f"the reference {file.path} has 1 image; a covariance needs at least 2")
            tally = self._tally(file.path, self._share(file), missing)
            for kind in missing:
                moments = moments_over_ranks(tally.moments[kind])
                found[kind] = Gaussian(*moments.finalize(), moments.n, COMPUTED)
        return found

    def _share(self, file: BatchFile) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """This rank's batches of a file; the ranks take turns, so a batch is the same on any number of them."""
        rank, ranks = dist_util.get_rank(), dist_util.get_world_size()
        with tqdm(total=len(file), desc=f"features of {file.path}", unit="img", disable=rank > 0, leave=False) as bar:
            for number, images in enumerate(file.batches(self.batch_size)):
                if number % ranks == rank:
                    yield number * self.batch_size, images
                bar.update(len(images))

    def _tally(self, what: str, batches: Batches, dims: dict[FeatureKind, int], split_size: int = 0) -> Tally:
        tally = Tally(dims, split_size)
        for start, images in batches:
            features = self.extractor.extract(images)
            check_finite(features, self.extractor, what, lambda row, start=start: f"image {start + row}")
            tally.add(features, start)
        return tally

    def _distance(self, key: str, reference: Gaussian, tally: Tally, kind: FeatureKind) -> Result:
        moments = moments_over_ranks(tally.moments[kind])
        parts = dist_util.on_main(frechet, reference.mu, reference.sigma, *moments.finalize())
        if parts.clipped > DAMAGED:
            logger.warn("a covariance of the reference has negative eigenvalues: its statistics are damaged")
        return Result(parts.distance, label(key, self.extractor), self.extractor.id, moments.n, COMPUTED,
                      reference.count, reference.source)


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
