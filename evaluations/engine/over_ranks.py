"""Precision, recall and kernel distance of sets whose points stay on the ranks that made them.

A block of at most `BLOCK` points travels at a time, so a rank holds its share and two blocks. Every function is one
step of all ranks together.

Shapes: N reference points and M samples on all ranks, n and m on this one, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch as th
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cm.distributed import setup as dist
from evaluations.defaults import NEIGHBOURS
from evaluations.metrics.arrays import Array
from evaluations.metrics.kid import KernelDistance, kid_draws, squared_mmd
from evaluations.metrics.precision_recall import (
    BLOCK,
    PrecisionRecall,
    blocks,
    keep_nearest,
    shifted,
    squared_distances,
)

DTYPE = np.float32


@dataclass
class Share:
    """This rank's part of a set."""

    points: NDArray[np.float32]                             # [n,D]
    places: NDArray[np.int64]                               # [n] of the points in the whole set
    count: int                                              # N

    def mean(self) -> NDArray[np.float32]:
        """Of the whole set, [D]."""
        total = th.from_numpy(self.points.sum(0, dtype=np.float64))
        return (dist.all_reduce_sum(total).numpy() / self.count).astype(DTYPE)

    def rows(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """The points at these places of the whole set, on every rank: [len(places),D]."""
        order = np.argsort(self.places)
        at = np.searchsorted(self.places, places, sorter=order)
        mine = at < len(order)
        mine[mine] = self.places[order[at[mine]]] == places[mine]
        rows = np.zeros((len(places), self.points.shape[1]))
        rows[mine] = self.points[order[at[mine]]]
        return dist.all_reduce_sum(th.from_numpy(rows)).numpy()


def precision_recall_over_ranks(ref: Share, sample: Share, k: int = NEIGHBOURS, block: int = BLOCK) -> PrecisionRecall:
    """The numbers of `evaluations.metrics.precision_recall.precision_recall`, in float32.

    :raises ValueError: if k does not lie between 1 and the smaller set's size - 1.
    """
    most = min(ref.count, sample.count) - 1
    if not 1 <= k <= most:
        raise ValueError(f"k={k} must lie between 1 and the smaller set's size - 1 ({most})")
    shift = ref.mean()
    ref_points, sample_points = (shifted(each.points, shift, DTYPE) for each in (ref, sample))
    ref_radii, sample_radii = (radii(points, k, block) for points in (ref_points, sample_points))
    inside = [
        hits(sample_points, ref_points, ref_radii, block),          # precision: samples in the reference's manifold
        hits(ref_points, sample_points, sample_radii, block),
    ]
    precise, recalled = dist.all_reduce_sum(th.tensor([each.sum() for each in inside], dtype=th.int64)).tolist()
    return PrecisionRecall(precise / sample.count, recalled / ref.count)


def radii(points: Array, k: int, block: int) -> Array:
    """Squared distance [n] of this rank's points to their k-th nearest neighbours in the whole set."""
    nearest = np.full((len(points), k), np.inf, DTYPE)
    for owner, columns, others in broadcast_blocks(points, block):
        for rows in blocks(len(points), block):
            distance = squared_distances(points[rows], others)
            if owner == dist.get_rank():
                itself = np.arange(rows.start, rows.stop)[:, None] == np.arange(columns.start, columns.stop)
                distance[itself] = np.inf
            keep_nearest(nearest[rows], distance)
    return nearest.max(1)


def hits(points: Array, centres: Array, centre_radii: Array, block: int) -> NDArray[np.bool_]:
    """Which of this rank's points [n] lie in the manifold of another set, of which `centres` are this rank's part."""
    found = np.zeros(len(points), bool)
    with_radii = np.concatenate([centres, centre_radii[:, None]], 1)
    for _, _, others in broadcast_blocks(with_radii, block):
        for rows in blocks(len(points), block):
            distance = squared_distances(points[rows], others[:, :-1])
            found[rows] |= (distance <= others[:, -1]).any(1)
    return found


def broadcast_blocks(points: Array, block: int) -> Iterator[tuple[int, slice, Array]]:
    """Every rank's points in turn, on all ranks: their owner, their rows on it, and the points."""
    rank = dist.get_rank()
    counts = dist.all_gather_object(len(points))
    with tqdm(total=sum(counts), desc="precision and recall: distances", unit="img", disable=rank > 0) as bar:
        for owner, count in enumerate(counts):
            for rows in blocks(count, block):
                yield owner, rows, dist.broadcast_object(points[rows] if owner == rank else None, owner)
                bar.update(rows.stop - rows.start)


def kid_over_ranks(ref: Share, sample: Share, subsets: int, subset_size: int, seed: int) -> KernelDistance:
    """The numbers of `evaluations.metrics.kid`; the ranks share out the subsets.

    :raises ValueError: if a set is smaller than a subset.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    values = np.zeros(subsets)
    draws = kid_draws(ref.count, sample.count, subsets, subset_size, seed)
    draws = tqdm(draws, "kernel distance", subsets, unit="subset", disable=rank > 0)
    for number, (sample_places, ref_places) in enumerate(draws):
        x, y = sample.rows(sample_places), ref.rows(ref_places)
        if number % ranks == rank:
            values[number] = squared_mmd(x, y)
    dist.all_reduce_sum(th.from_numpy(values))
    return KernelDistance(float(values.mean()), float(values.std()), values)
