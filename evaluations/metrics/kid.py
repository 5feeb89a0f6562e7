"""The kernel distance (KID) of two sets of features, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from evaluations.metrics.arrays import Array, as_pair


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
    ref, sample = as_pair(ref, sample)
    draws = kid_draws(len(ref), len(sample), subsets, subset_size, seed)
    values = np.array([
        squared_mmd(sample[i].astype(np.float64), ref[j].astype(np.float64))
        for i, j in tqdm(draws, "kernel distance", subsets, unit="subset", disable=not progress)
    ])
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
    """[M,D], [N,D] -> [M,N]."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base
