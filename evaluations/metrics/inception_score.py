"""The Inception Score of class probabilities, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluations.defaults import SPLIT_SIZE
from evaluations.metrics.arrays import Array, as_points
from evaluations.metrics.base import Metric, Number, Settings, Side
from evaluations.metrics.points import Ranks


class InceptionScore:
    """exp of the mean divergence of p(y|x) from p(y), per chunk of `split_size` images in file order, then averaged.

    Salimans et al. 2016, "Improved Techniques for Training GANs". A chunk is kept as its count, its sum of p ln p and
    its sum of p, which add up, so parts of a set may be scored apart, see `sums`.
    """

    def __init__(self, split_size: int = SPLIT_SIZE):
        if split_size < 1:
            raise ValueError(f"split_size={split_size}: a chunk holds at least 1 image")
        self.split_size = split_size
        self.seen = 0
        self.chunks: dict[int, tuple[int, float, Array]] = {}       # number -> (n, sum p ln p, sum p [K])

    def update(self, values: Array, start: int | None = None) -> None:
        """Add logits [B,K] of images start, start+1, ... of the set (by default: those after the last update).

        :raises ValueError: if the shape does not fit or a logit is not finite.
        """
        x = as_points(values, "logits", np.float64)
        first = self.seen if start is None else start
        self.seen = first + len(x)
        log_p = x - x.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))        # p ln p stays finite where p underflows
        numbers = np.arange(first, self.seen) // self.split_size
        for number in np.unique(numbers):
            rows = log_p[numbers == number]
            p = np.exp(rows)
            self.add(int(number), len(rows), float((p * rows).sum()), p.sum(0))

    def add(self, number: int, n: int, p_log_p: float, p: Array) -> None:
        """Add sums to a chunk."""
        if number in self.chunks:
            n_old, p_log_p_old, p_old = self.chunks[number]
            if p_old.shape != p.shape:
                raise ValueError(f"logits of {len(p)} classes after logits of {len(p_old)}")
            n, p_log_p, p = n + n_old, p_log_p + p_log_p_old, p + p_old
        self.chunks[number] = (n, p_log_p, p)

    def sums(self) -> list[NDArray[Any]]:
        """One array [chunks,2+K]: n, sum p ln p and sum p of every chunk up to the last one seen."""
        if not self.chunks:
            return [np.zeros((0, 2))]
        classes = len(next(iter(self.chunks.values()))[2])
        table = np.zeros((max(self.chunks) + 1, 2 + classes))
        for number, (n, p_log_p, p) in self.chunks.items():
            table[number] = n, p_log_p, *p
        return [table]

    def with_sums(self, sums: list[NDArray[Any]]) -> InceptionScore:
        """A score of the chunks in such an array."""
        total = InceptionScore(self.split_size)
        for number, row in enumerate(sums[0]):
            if row[0]:
                total.add(number, int(row[0]), float(row[1]), row[2:])
        return total

    def per_chunk(self) -> Array:
        """The score of each chunk, in file order."""
        scores = []
        for _, (n, p_log_p, p) in sorted(self.chunks.items()):
            mean = p / n                                            # [K]
            log_mean = np.log(np.where(mean > 0, mean, 1))          # 0 ln 0 = 0
            scores.append(np.exp(p_log_p / n - (mean * log_mean).sum()))
        return np.array(scores)

    def finalize(self) -> float:
        """The mean over chunks.

        :raises ValueError: if no image was seen.
        """
        if not self.chunks:
            raise ValueError("an Inception Score needs at least 1 image")
        return float(self.per_chunk().mean())


class Score(Metric):
    """The Inception Score of the samples."""

    results = {"inception_score": ("Inception Score", "Classifier score")}
    output, of_samples_alone = "logits", True

    def make_partial(self, settings: Settings, labels: NDArray[np.int64] | None) -> InceptionScore:
        """A score of no image."""
        return InceptionScore(settings.split_size)

    def measure(self, ref: Side, sample: Side, settings: Settings, ranks: Ranks) -> dict[str, Number]:
        """The mean over chunks."""
        return {"inception_score": Number(sample.partial(self).finalize())}

    def reported(self, settings: Settings, smaller: int) -> dict[str, Any]:
        """The size of a chunk."""
        return {"split_size": settings.split_size}


def inception_score(logits: Array, split_size: int = SPLIT_SIZE) -> float:
    """The Inception Score of logits [N,K]; published numbers leave out the bias of the last layer."""
    score = InceptionScore(split_size)
    score.update(logits)
    return score.finalize()
