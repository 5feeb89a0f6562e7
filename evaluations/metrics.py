"""The numbers, from features that are already there, in float64; precision and recall have a room of their own.

Shapes: N points of a set, B a batch of them, D feature dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from evaluations.arrays import Array, as_gaussian, as_pair, as_points
from evaluations.defaults import SPLIT_SIZE
from evaluations.manifold import PrecisionRecall, precision_recall

__all__ = [
    "Frechet", "InceptionScore", "KernelDistance", "Moments", "PrecisionRecall", "frechet", "frechet_distance",
    "inception_score", "kid", "kid_draws", "precision_recall", "squared_mmd",
]

WAITING = 512                                               # points whose products are taken at once, which is quicker


# --- mean and covariance -------------------------------------------------------------------------------------------


class Moments:
    """Mean and covariance of features in one pass: keeps n, s = sum x and Q = sum x x^T, which add up over parts."""

    def __init__(self, dim: int):
        self.n = 0
        self.s = np.zeros(dim)                              # [D]
        self._Q = np.zeros((dim, dim))                      # [D,D], without the points that wait
        self._waiting: list[Array] = []
        self._count = 0                                     # of points that wait

    @property
    def Q(self) -> Array:
        """[D,D]."""
        self._take_in()
        return self._Q

    def _take_in(self) -> None:
        if self._waiting:
            x = np.concatenate(self._waiting)
            self._Q += x.T @ x
            self._waiting, self._count = [], 0

    def update(self, features: Array) -> None:
        """Take in features [B,D].

        :raises ValueError: if the shape does not fit or a feature is not finite.
        """
        x = as_points(features, "features", np.float64)
        if x.shape[1] != len(self.s):
            raise ValueError(f"features have {x.shape[1]} dimensions; these moments were begun with {len(self.s)}")
        self.n += len(x)
        self.s += x.sum(0)
        self._waiting.append(x.copy() if x is features else x)                  # the caller may use its array again
        self._count += len(x)
        if self._count >= WAITING:
            self._take_in()

    def merge(self, other: Moments) -> None:
        """Take in what another part of the set has gathered.

        :raises ValueError: if its dimension differs.
        """
        if len(other.s) != len(self.s):
            raise ValueError(f"cannot merge moments of {len(other.s)} and {len(self.s)} dimensions")
        self.add_sums(other.n, other.s, other.Q)

    def add_sums(self, n: int, s: Array, Q: Array) -> None:
        """Take in the sums of another part of the set."""
        self.n += n
        self.s += s
        self._Q += Q

    def finalize(self) -> tuple[Array, Array]:
        """mu [D] and sigma [D,D], normalised by n - 1 like np.cov.

        :raises ValueError: for fewer than two points.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 points, not {self.n}")
        mu = self.s / self.n
        return mu, (self.Q - self.n * np.outer(mu, mu)) / (self.n - 1)


# --- Frechet distance ----------------------------------------------------------------------------------------------


class Frechet(NamedTuple):
    """The distance, its two terms, and the rounding noise (or damage) that was cut away."""

    distance: float
    mean_term: float
    covariance_term: float
    clipped: float                                          # negative eigenvalues set to 0, as a share of the trace


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Frechet distance of two Gaussians, mu [D] and sigma [D,D]: FID on Inception's pooled features.

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6; terms: `frechet`.
    """
    return frechet(mu1, sigma1, mu2, sigma2).distance


def frechet(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> Frechet:
    """|mu1 - mu2|^2 + Tr sigma1 + Tr sigma2 - 2 Tr (sigma1 sigma2)^(1/2), with its parts.

    The root is taken through R = sigma1^(1/2): sigma1 sigma2 has the eigenvalues of the symmetric R sigma2 R, so there
    are no complex numbers, and singular covariances (fewer points than dimensions) need no epsilon.
    `clipped` beyond about 1e-6 means that a covariance is damaged.

    :raises ValueError: if shapes differ or values are not finite.
    """
    mu1, sigma1 = as_gaussian(mu1, sigma1, "first")
    mu2, sigma2 = as_gaussian(mu2, sigma2, "second")
    if len(mu1) != len(mu2):
        raise ValueError(f"the two Gaussians have {len(mu1)} and {len(mu2)} dimensions: not the same features")
    eigenvalues, vectors = np.linalg.eigh(sigma1)
    root1 = (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T
    product = root1 @ sigma2 @ root1
    product_eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)

    mean_term = float(np.square(mu1 - mu2).sum())
    covariance_term = float(np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(product_eigenvalues.clip(min=0)).sum())
    clipped = max(negative_share(eigenvalues), negative_share(product_eigenvalues))
    return Frechet(max(mean_term + covariance_term, 0.0), mean_term, covariance_term, clipped)


def negative_share(eigenvalues: Array) -> float:
    size = np.abs(eigenvalues).sum()
    return float(np.abs(eigenvalues.clip(max=0)).sum() / size) if size else 0.0


# --- Inception Score -----------------------------------------------------------------------------------------------


class InceptionScore:
    """exp of the mean divergence of p(y|x) from p(y), per chunk of `split_size` images in file order, then averaged.

    Salimans et al. 2016, "Improved Techniques for Training GANs". A chunk is kept as its count, its sum of p ln p and
    its sum of p, which add up, so parts of a set may be scored apart and merged.
    """

    def __init__(self, split_size: int = SPLIT_SIZE):
        if split_size < 1:
            raise ValueError(f"split_size={split_size}: a chunk holds at least 1 image")
        self.split_size = split_size
        self.seen = 0
        self.chunks: dict[int, tuple[int, float, Array]] = {}       # number -> (n, sum p ln p, sum p [K])

    def update(self, logits: Array, start: int | None = None) -> None:
        """Take in logits [B,K] of images start, start+1, ... of the set (by default: those after the last update).

        :raises ValueError: if the shape does not fit or a logit is not finite.
        """
        x = as_points(logits, "logits", np.float64)
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

    def merge(self, other: InceptionScore) -> None:
        """Take in the chunks of another part of the set.

        :raises ValueError: if it was cut into chunks of another size.
        """
        if other.split_size != self.split_size:
            raise ValueError(f"cannot merge scores of split_size {other.split_size} and {self.split_size}")
        for number, sums in other.chunks.items():
            self.add(number, *sums)

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


def inception_score(logits: Array, split_size: int = SPLIT_SIZE) -> float:
    """The Inception Score of logits [N,K]; published numbers leave out the bias of the last layer."""
    score = InceptionScore(split_size)
    score.update(logits)
    return score.finalize()


# --- kernel distance -----------------------------------------------------------------------------------------------


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
