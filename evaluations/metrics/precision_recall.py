"""Precision and recall: how far two sets of features overlap, as unions of balls around their points.

Shapes: N reference points, M samples, D feature dimensions, B and C rows and columns of a block of distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tqdm.auto import tqdm

from evaluations.defaults import NEIGHBOURS
from evaluations.metrics.arrays import Array, as_pair, as_points

BLOCK = 2048                                                # rows and columns of distances held at a time


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class Hits(NamedTuple):
    """Which points lie in the other set's manifold."""

    samples: NDArray[np.bool_]                              # [M]
    reference: NDArray[np.bool_]                            # [N]


def precision_recall(
    ref: Array, sample: Array, k: int = NEIGHBOURS, *, dtype: DTypeLike = np.float32, block: int = BLOCK,
    progress: bool = False,
) -> PrecisionRecall:
    """Share of the samples [M,D] in the manifold of the reference [N,D], and of the reference in that of the samples.

    Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric", section 2: a set's manifold is the union of balls
    around its points that reach to the k-th nearest neighbour.
    Beside the features this takes 2 block (block + D) numbers of `dtype` and k per point: 64 MiB at 2048-d float32,
    whatever N and M.

    :param dtype: of the distances; float32 suffices because both sets are first shifted by the reference mean. float16
        imitates guided-diffusion, which shifts nothing: its numbers are off in the second or third digit.
    :raises ValueError: if k does not lie between 1 and the smaller set's size - 1, or dimensions differ.
    """
    ref, sample = as_pair(ref, sample)
    dtype = np.dtype(dtype)
    if dtype == np.float16 and not fit_half(ref, sample):
        dtype = np.dtype(np.float32)
    shift = centre(ref) if dtype != np.float16 else np.zeros(ref.shape[1], ref.dtype)
    total = pairs(len(ref), len(sample), block)
    with tqdm(None, "precision and recall", total, unit="pair", unit_scale=True, disable=not progress) as bar:
        options = {"shift": shift, "dtype": dtype, "block": block, "bar": bar}
        ref_radii = manifold_radii(ref, k, **options)
        sample_radii = manifold_radii(sample, k, **options)
        hits = manifold_hits(ref, ref_radii, sample, sample_radii, **options)
    return PrecisionRecall(float(hits.samples.mean()), float(hits.reference.mean()))


def manifold_radii(
    points: Array, k: int = NEIGHBOURS, *, shift: Array | None = None, dtype: DTypeLike = np.float32,
    block: int = BLOCK, bar: tqdm | None = None,
) -> Array:
    """Squared distance [N] of each point [N,D] to its k-th nearest neighbour, itself (but no twin of it) left out.

    :param shift: [D] taken from every point against cancellation; by default the mean of the points.
    :param bar: told of the pairs that are done.
    :raises ValueError: if k does not lie between 1 and N - 1.
    """
    points = as_points(points, "points")
    if not 1 <= k < len(points):
        raise ValueError(f"k={k} must lie between 1 and the number of points - 1 ({len(points) - 1})")
    shift = centre(points) if shift is None else shift
    nearest = np.full((len(points), k), np.inf, dtype)      # the k smallest so far
    for rows in blocks(len(points), block):
        x = shifted(points[rows], shift, dtype)
        for columns in blocks(rows.start, block):           # the matrix is symmetric: one triangle serves both sides
            distance = squared_distances(x, shifted(points[columns], shift, dtype))
            keep_nearest(nearest[rows], distance)
            keep_nearest(nearest[columns], distance.T)
        distance = squared_distances(x, x)
        np.fill_diagonal(distance, np.inf)
        keep_nearest(nearest[rows], distance)
        if bar is not None:
            bar.update(len(x) * rows.stop)
    return nearest.max(1)


def keep_nearest(nearest: Array, distance: Array) -> None:
    """Replace the rows' k smallest values [B,k] by the k smallest of them and the new distances [B,C], in place."""
    k = nearest.shape[1]
    if distance.shape[1] > k:
        distance = np.partition(distance, k - 1, axis=1)[:, :k]
    nearest[:] = np.partition(np.concatenate([nearest, distance], 1), k - 1, axis=1)[:, :k]


def manifold_hits(
    ref: Array, ref_radii: Array, sample: Array, sample_radii: Array,
    *, shift: Array, dtype: DTypeLike = np.float32, block: int = BLOCK, bar: tqdm | None = None,
) -> Hits:
    """Which samples [M,D] lie within a reference point's squared radius [N], and the other way round."""
    in_ref = np.zeros(len(sample), bool)
    in_samples = np.zeros(len(ref), bool)
    for rows in blocks(len(ref), block):
        x = shifted(ref[rows], shift, dtype)
        for columns in blocks(len(sample), block):
            distance = squared_distances(x, shifted(sample[columns], shift, dtype))
            in_ref[columns] |= (distance <= ref_radii[rows, None]).any(0)
            in_samples[rows] |= (distance <= sample_radii[columns]).any(1)
        if bar is not None:
            bar.update(len(x) * len(sample))
    return Hits(in_ref, in_samples)


def pairs(num_ref: int, num_sample: int, block: int) -> int:
    """Distances that are taken in blocks: about half of each set's own, and those between the sets."""
    own = [sum((rows.stop - rows.start) * rows.stop for rows in blocks(n, block)) for n in (num_ref, num_sample)]
    return sum(own) + num_ref * num_sample


def blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def centre(points: Array) -> Array:
    return points.mean(0, dtype=np.float64).astype(points.dtype)


def shifted(points: Array, shift: Array, dtype: DTypeLike) -> Array:
    return (points - shift).astype(dtype, copy=False)


def squared_distances(x: Array, y: Array) -> Array:
    """[B,D], [C,D] -> [B,C], by |x|^2 - 2 x.y + |y|^2, clamped at 0."""
    if x.dtype == np.float16:
        return half_distances(x, y)
    distance = x @ y.T
    distance *= -2
    distance += np.einsum("bd,bd->b", x, x)[:, None]
    distance += np.einsum("cd,cd->c", y, y)
    return distance.clip(min=0, out=distance)


def half_distances(x: Array, y: Array) -> Array:
    """The same with every term rounded to float16, and sums over D in float32, as GPUs do it."""
    x, y = x.astype(np.float32), y.astype(np.float32)
    product = (x @ y.T).astype(np.float16)
    norms_x, norms_y = (np.einsum("bd,bd->b", z, z).astype(np.float16) for z in (x, y))
    return (norms_x[:, None] - 2 * product + norms_y).clip(min=0)


def fit_half(*sets: Array) -> bool:
    """Whether no squared distance can leave the range of float16; beyond it guided-diffusion falls back to float32."""
    longest = max(float(np.einsum("nd,nd->n", points, points).max()) for points in sets)
    return 4 * longest < float(np.finfo(np.float16).max)
