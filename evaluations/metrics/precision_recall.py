"""Precision and recall: the overlap of two sets of features, each represented by balls around its points.

Shapes: N reference points, M samples, D feature dimensions, B and C rows and columns of a block of distances.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from evaluations.defaults import NEIGHBOURS
from evaluations.metrics.arrays import Array, as_pair
from evaluations.metrics.base import Metric, Number, Settings, Side, bar
from evaluations.metrics.points import PointSet, Ranks, blocks

BLOCK = 2048                                                # rows and columns of distances held at a time


class PrecisionRecall(NamedTuple):
    """Two shares, between 0 and 1."""

    precision: float
    recall: float


class Hits(NamedTuple):
    """Whether each point lies in the manifold of the other set."""

    samples: NDArray[np.bool_]                              # [M]
    reference: NDArray[np.bool_]                            # [N]


def precision_recall(
    ref: Array, sample: Array, k: int = NEIGHBOURS, *, dtype: DTypeLike = np.float32, block: int = BLOCK,
    progress: bool = False,
) -> PrecisionRecall:
    """Share of the samples [M,D] in the manifold of the reference [N,D], and of the reference in that of the samples.

    Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric", section 2: a set's manifold is the union of balls
    around its points that reach to the k-th nearest neighbour.
    Besides the features this takes 2 block (block + D) numbers of `dtype` and k per point: 64 MiB at 2048-d float32,
    whatever N and M.

    :param dtype: of the distances; float32 suffices because both sets are first shifted by the reference mean. float16
        imitates guided-diffusion, which shifts nothing: its numbers are off in the second or third digit.
    :raises ValueError: if k does not lie between 1 and the smaller set's size - 1, or dimensions differ.
    """
    ref_points, sample_points = as_pair(ref, sample)
    return precision_recall_of_sets(
        PointSet(ref_points), PointSet(sample_points), k, dtype=dtype, block=block, progress=progress
    )


def precision_recall_of_sets(
    ref: PointSet, sample: PointSet, k: int = NEIGHBOURS, *, dtype: DTypeLike = np.float32, block: int = BLOCK,
    progress: bool = False,
) -> PrecisionRecall:
    """`precision_recall` of sets that may be distributed over ranks, which must call it together.

    The points stay on their ranks, and one block at a time is broadcast.

    :raises ValueError: if k does not lie between 1 and the smaller set's size - 1.
    """
    most = min(ref.count, sample.count) - 1
    if not 1 <= k <= most:
        raise ValueError(f"k={k} must lie between 1 and the smaller set's size - 1 ({most})")
    ranks, dtype = ref.ranks, np.dtype(dtype)
    if dtype == np.float16 and not fit_half(ref, sample):
        dtype = np.dtype(np.float32)
    shift = ref.mean() if dtype != np.float16 else np.zeros(ref.points.shape[1], ref.points.dtype)
    with bar("precision and recall", _pairs_here(ref, sample, block), "pair", progress and ranks.rank == 0) as shown:
        distances = Distances(shift, dtype, block, shown)
        ref_radii, sample_radii = manifold_radii(ref, k, distances), manifold_radii(sample, k, distances)
        hits = manifold_hits(ref, ref_radii, sample, sample_radii, distances)
    recalled = int(ranks.sum(np.array(hits.reference.sum(), np.int64)))
    return PrecisionRecall(float(hits.samples.sum() / sample.count), recalled / ref.count)


class Distances(NamedTuple):
    """How distances of points are computed, in blocks, with a progress bar."""

    shift: Array                                            # [D], taken from every point
    dtype: DTypeLike
    block: int
    bar: Any = None                                         # advanced by the pairs that are done

    def done(self, x: Array, y: Array) -> None:
        if self.bar is not None:
            self.bar.update(len(x) * len(y))

    def shifted(self, points: Array) -> Array:
        return (points - self.shift).astype(self.dtype, copy=False)


def manifold_radii(of: PointSet, k: int, distances: Distances) -> Array:
    """Squared distances [n] of this rank's points to their k-th nearest neighbours in the complete set."""
    here, rank = of.points, of.ranks.rank
    nearest = np.full((len(here), k), np.inf, distances.dtype)   # the k smallest so far
    for owner, columns, others in of.blocks(distances.block):
        y = distances.shifted(others)
        for rows in blocks(len(here), distances.block):
            if owner == rank and rows.start < columns.start:
                continue                                    # the matrix is symmetric: one triangle serves both sides
            x = distances.shifted(here[rows])
            distance = squared_distances(x, y)
            if owner == rank and rows.start == columns.start:
                np.fill_diagonal(distance, np.inf)
            elif owner == rank:
                keep_nearest(nearest[columns], distance.T)
            keep_nearest(nearest[rows], distance)
            distances.done(x, y)
    return nearest.max(1)


def manifold_hits(ref: PointSet, ref_radii: Array, sample: PointSet, sample_radii: Array, distances: Distances) -> Hits:
    """Which samples of all ranks, in the order of ranks, and which reference points of this rank are covered.

    A point is covered if it lies within the squared radius of a point of the other set.
    """
    ranks, here = ref.ranks, ref.points
    in_ref, in_samples = [], np.zeros(len(here), bool)
    for owner, columns, others in sample.blocks(distances.block):
        radii = ranks.broadcast(sample_radii[columns] if owner == ranks.rank else None, owner)
        y, found = distances.shifted(others), np.zeros(len(others), bool)
        for rows in blocks(len(here), distances.block):
            x = distances.shifted(here[rows])
            distance = squared_distances(x, y)
            found |= (distance <= ref_radii[rows, None]).any(0)
            in_samples[rows] |= (distance <= radii).any(1)
            distances.done(x, y)
        in_ref.append(found)
    anywhere = ranks.max(np.concatenate(in_ref).astype(np.uint8))
    return Hits(anywhere.astype(bool), in_samples)


def keep_nearest(nearest: Array, distance: Array) -> None:
    """Replace the rows' k smallest values [B,k] by the k smallest of them and the new distances [B,C], in place."""
    k = nearest.shape[1]
    if distance.shape[1] > k:
        distance = np.partition(distance, k - 1, axis=1)[:, :k]
    nearest[:] = np.partition(np.concatenate([nearest, distance], 1), k - 1, axis=1)[:, :k]


def pairs(num_ref: int, num_sample: int, block: int) -> int:
    """The number of distances that are computed: about half of those within each set, and all between the sets."""
    own = [sum((rows.stop - rows.start) * rows.stop for rows in blocks(n, block)) for n in (num_ref, num_sample)]
    return sum(own) + num_ref * num_sample


def _pairs_here(ref: PointSet, sample: PointSet, block: int) -> int:
    """`pairs` for the points of this rank."""
    own = [(len(each.points), each.count) for each in (ref, sample)]
    return pairs(own[0][0], own[1][0], block) - own[0][0] * own[1][0] + own[0][0] * sample.count + sum(
        here * (count - here) for here, count in own
    )


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


def fit_half(ref: PointSet, sample: PointSet) -> bool:
    """Whether no squared distance can leave the range of float16; beyond it guided-diffusion falls back to float32."""
    return 4 * max(ref.longest(), sample.longest()) < float(np.finfo(np.float16).max)


class PrecisionRecallMetric(Metric):
    """Improved precision and recall."""

    results = {"precision": ("Precision", "Precision"), "recall": ("Recall", "Recall")}
    needs_points = True

    def least(self, settings: Settings) -> int:
        """k + 1: the k-th neighbour of a point is another point."""
        return settings.k + 1

    def measure(self, ref: Side, sample: Side, settings: Settings, ranks: Ranks) -> dict[str, Number]:
        """Both shares."""
        found = precision_recall_of_sets(
            ref.points, sample.points, settings.k, dtype=settings.pr_dtype, progress=settings.progress
        )
        return {"precision": Number(found.precision), "recall": Number(found.recall)}

    def reported(self, settings: Settings, smaller: int) -> dict[str, Any]:
        """Neighbours, and the type of distances."""
        return {"k": settings.k, "pr_dtype": settings.pr_dtype}
