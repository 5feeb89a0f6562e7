"""The kernel distance (KID) of two sets of features, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluations.metrics.arrays import Array, as_pair
from evaluations.metrics.base import Metric, Number, Settings, Side, bar
from evaluations.metrics.points import PointSet, Ranks

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020


class KernelDistance(NamedTuple):
    """Mean and population standard deviation over the subsets, and each subset's value."""

    mean: float
    std: float
    values: Array


def kid(
    ref: Array, sample: Array, subsets: int = 100, subset_size: int = 1000, seed: int = 2020, *, progress: bool = False
) -> KernelDistance:
    """Kernel distance of features ref [N,D] and sample [M,D], averaged over random subsets; on Inception's, KID.

    Binkowski et al. 2018, "Demystifying MMD GANs". The draws are numpy's RandomState(seed), per subset the samples'
    rows before the reference's, which other tools share.

    :raises ValueError: if a set is smaller than a subset, or dimensions differ.
    """
    ref_points, sample_points = as_pair(ref, sample)
    return kid_of_sets(PointSet(ref_points), PointSet(sample_points), subsets, subset_size, seed, progress=progress)


def kid_of_sets(
    ref: PointSet, sample: PointSet, subsets: int, subset_size: int, seed: int, *, progress: bool = False
) -> KernelDistance:
    """`kid` of sets that may be distributed over ranks. The ranks share the subsets, and must call it together.

    :raises ValueError: if a set is smaller than a subset.
    """
    ranks, values = ref.ranks, np.zeros(subsets)
    with bar("kernel distance", subsets, "subset", progress and ranks.rank == 0) as shown:
        draws = kid_draws(ref.count, sample.count, subsets, subset_size, seed)
        for number, (sample_places, ref_places) in enumerate(draws):
            x, y = sample.rows(sample_places), ref.rows(ref_places)
            if number % ranks.count == ranks.rank:
                values[number] = squared_mmd(x, y)
            shown.update(1)
    values = ranks.sum(values)
    return KernelDistance(float(values.mean()), float(values.std()), values)


def kid_draws(
    num_ref: int, num_sample: int, subsets: int, subset_size: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of the samples and of the reference in each subset.

    :raises ValueError: if a set is smaller than a subset.
    """
    if subsets < 1:
        raise ValueError(f"subsets={subsets}: at least 1 is needed")
    if not 2 <= subset_size <= min(num_ref, num_sample):
        raise ValueError(
            f"subset_size={subset_size} must lie between 2 and the smaller set ({num_ref} reference points, "
            f"{num_sample} samples)"
        )
    rng = np.random.RandomState(seed)
    for _ in range(subsets):
        yield rng.choice(num_sample, subset_size, replace=False), rng.choice(num_ref, subset_size, replace=False)


def squared_mmd(x: Array, y: Array) -> float:
    """Unbiased squared maximum mean discrepancy of x [M,D] and y [N,D], kernel (x.y/D + 1)^3."""
    within_x, within_y = cubic_kernel(x, x), cubic_kernel(y, y)
    m, n = len(x), len(y)
    return float(
        (within_x.sum() - np.trace(within_x)) / (m * (m - 1))
        + (within_y.sum() - np.trace(within_y)) / (n * (n - 1))
        - 2 * cubic_kernel(x, y).mean()
    )


def cubic_kernel(x: Array, y: Array) -> Array:
    """(x.y/D + 1)^3 of every pair: [M,D], [N,D] -> [M,N]."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base


class KernelMetric(Metric):
    """KID, in subsets of `KID_SUBSET_SIZE` images, or of all images of the smaller set if these are fewer."""

    results = {"kernel_distance": ("KID", "Kernel distance")}
    needs_points = True

    def least(self, settings: Settings) -> int:
        """Two: the unbiased estimate omits the kernel of each point with itself."""
        return 2

    def measure(self, ref: Side, sample: Side, settings: Settings, ranks: Ranks) -> dict[str, Number]:
        """The mean over subsets, with their standard deviation."""
        size = min(KID_SUBSET_SIZE, ref.points.count, sample.points.count)
        distance = kid_of_sets(ref.points, sample.points, KID_SUBSETS, size, KID_SEED, progress=settings.progress)
        return {"kernel_distance": Number(distance.mean, distance.std)}

    def reported(self, settings: Settings, smaller: int) -> dict[str, Any]:
        """Number, seed and size of the subsets."""
        return {"kid_subsets": KID_SUBSETS, "kid_seed": KID_SEED, "kid_subset_size": min(KID_SUBSET_SIZE, smaller)}
