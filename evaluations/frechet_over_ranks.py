"""The Frechet distance of images that all ranks make together, from a reference they measure together.

Shapes: B images of a batch, H and W height and width, D features.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch as th
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cm import dist_util, logger
from cm.registry import UserError
from evaluations.comparison import NAMES
from evaluations.features import Extractor
from evaluations.image_sets import POOLED
from evaluations.metrics import Moments, frechet_distance
from evaluations.readers import BatchFile, Statistics

KEY = "frechet_distance"


class FrechetOverRanks:
    """Distances from one reference; every method is one step of all ranks together.

    :param ref_path: npz of reference images or of statistics.
    :param image_size: side of the images to be compared, in pixels.
    :param batch_size: reference images per pass and rank.
    :raises UserError: if the file cannot be used, or stores statistics of other features.
    """

    def __init__(self, ref_path: str, extractor: Extractor, image_size: int, batch_size: int):
        self.extractor = extractor
        self.label = label(extractor)
        # Asked of blank images, so that a rank without any image knows the dimension too.
        self.dim = extractor.extract(np.zeros((2, image_size, image_size, 3), np.uint8)).pool.shape[1]
        file = BatchFile(ref_path)
        self.reference = file.statistics(POOLED.suffix) or self.measure(file, batch_size)
        check_features(ref_path, self.reference, extractor, self.dim)

    def distance(self, batches: Iterable[NDArray[np.uint8]]) -> float:
        """The distance of the images [B,H,W,3] of all ranks; the same number on every rank.

        :param batches: this rank's share, possibly none.
        """
        moments = Moments(self.dim)
        for images in batches:
            moments.update(self.extractor.extract(images).pool)
        mu, sigma = over_ranks(moments).finalize()
        return dist_util.on_main(frechet_distance, self.reference.mu, self.reference.sigma, mu, sigma)

    def warn_of_few(self, num_images: int) -> None:
        """Say so if a distance of that many images is badly biased."""
        if num_images < self.dim:
            logger.warn(too_few(num_images, self.dim))

    def measure(self, file: BatchFile, batch_size: int) -> Statistics:
        """Statistics of the reference images, which the ranks share out batch by batch."""
        if len(file) < 2:
            raise UserError(f"the reference {file.path} has 1 image; a covariance needs at least 2")
        moments, rank, ranks = Moments(self.dim), dist_util.get_rank(), dist_util.get_world_size()
        bar = tqdm(total=len(file), desc="reference", unit="image", disable=rank > 0, leave=False)
        with bar:
            for number, images in enumerate(file.batches(batch_size)):
                if number % ranks == rank:
                    moments.update(self.extractor.extract(images).pool)
                bar.update(len(images))
        return Statistics(*over_ranks(moments).finalize(), self.extractor.id, len(file))


def label(extractor: Extractor) -> str:
    """FID in Inception's features, and a plain name in those of another network."""
    famous, plain = NAMES[KEY]
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


def over_ranks(moments: Moments) -> Moments:
    """The moments of all ranks' features together."""
    total = Moments(len(moments.s))
    total.n = int(dist_util.all_reduce_sum(th.tensor(moments.n)))
    total.s, total.Q = (dist_util.all_reduce_sum(th.from_numpy(part)).numpy() for part in (moments.s, moments.Q))
    return total
