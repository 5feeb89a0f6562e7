"""The Frechet distance of two Gaussians, and running moments of features, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluations.metrics.arrays import Array, as_gaussian, as_points
from evaluations.metrics.base import POOLED, SPATIAL, STORED, FeatureKind, Metric, Number, Settings, Side
from evaluations.metrics.points import Ranks

CLIPPED = 1e-4                                              # share of negative eigenvalues that no rounding explains
NO_SPREAD = 1e-9                                            # variance, as a share of the squared mean, of equal images

WAITING = 512                                               # points of one matrix product, for speed


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
        """Sum of x x^T: [D,D]."""
        self._take_in()
        return self._Q

    def _take_in(self) -> None:
        if self._waiting:
            x = np.concatenate(self._waiting)
            self._Q += x.T @ x
            self._waiting, self._count = [], 0

    def update(self, values: Array, start: int = 0) -> None:
        """Add features [B,D]; their place in the set (`start`) does not matter.

        :raises ValueError: if the shape does not fit or a feature is not finite.
        """
        x = as_points(values, "features", np.float64)
        if x.shape[1] != len(self.s):
            raise ValueError(f"features have {x.shape[1]} dimensions; these moments were begun with {len(self.s)}")
        self.n += len(x)
        self.s += x.sum(0)
        self._waiting.append(x.copy() if x is values else x)                    # the caller may use its array again
        self._count += len(x)
        if self._count >= WAITING:
            self._take_in()

    def add_sums(self, n: int, s: Array, Q: Array) -> None:
        """Add the sums of another part of the set."""
        self.n += n
        self.s += s
        self._Q += Q

    def sums(self) -> list[NDArray[Any]]:
        """n [1], s [D] and Q [D,D]; copies."""
        return [np.array([self.n]), self.s.copy(), self.Q.copy()]

    def with_sums(self, sums: list[NDArray[Any]]) -> Moments:
        """The moments from these sums."""
        total = Moments(len(self.s))
        total.add_sums(int(sums[0][0]), sums[1], sums[2])
        return total

    def finalize(self) -> tuple[Array, Array]:
        """mu [D] and sigma [D,D], normalised by n - 1 like np.cov.

        :raises ValueError: for fewer than two points.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 points, not {self.n}")
        mu = self.s / self.n
        return mu, (self.Q - self.n * np.outer(mu, mu)) / (self.n - 1)


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
    """The sum of the negative eigenvalues of [D], as a fraction of the sum of absolute values."""
    size = np.abs(eigenvalues).sum()
    return float(np.abs(eigenvalues.clip(max=0)).sum() / size) if size else 0.0


class FrechetMetric(Metric):
    """FID from pooled features, sFID from spatial ones.

    :param key: key of the result.
    :param names: names of the result, in Inception's features and in those of another network.
    """

    def __init__(self, key: str, kind: FeatureKind, names: tuple[str, str]):
        self.key, self.moments, self.output, self.results = key, kind, kind.field, {key: names}

    def least(self, settings: Settings) -> int:
        """A covariance needs two images, unless statistics are stored."""
        return 2

    def measure(self, ref: Side, sample: Side, settings: Settings, ranks: Ranks) -> dict[str, Number]:
        """The distance, computed on rank 0."""
        assert self.moments is not None
        parts, warnings = ranks.on_main(_distance_and_warnings, ref, sample, self.moments)
        return {self.key: Number(parts.distance, clipped=parts.clipped, warnings=warnings)}


def _distance_and_warnings(ref: Side, sample: Side, kind: FeatureKind) -> tuple[Frechet, tuple[str, ...]]:
    a, b = ref.gaussian(kind), sample.gaussian(kind)
    parts = frechet(a.mu, a.sigma, b.mu, b.sigma)
    reasons = []
    for side, each in ((ref, a), (sample, b)):
        if np.trace(each.sigma) <= NO_SPREAD * float(each.mu @ each.mu):
            reasons.append(f"the {side.role} ({side.path}) are all but identical: their features have no spread, so "
                           "the number says only how far that one image is from the other set")
        elif parts.clipped > CLIPPED and each.source == STORED and (
            negative_share(np.linalg.eigvalsh(each.sigma)) > CLIPPED
        ):
            reasons.append(f"the covariance stored in {side.path} has negative eigenvalues, so its statistics are "
                           "damaged; make them again")
    if parts.clipped > CLIPPED and not reasons:
        reasons.append(f"negative eigenvalues beyond rounding, {parts.clipped:.1g} of all, were set to 0")
    return parts, tuple(reasons)


FRECHET_KEY = "frechet_distance"
FID = FrechetMetric(FRECHET_KEY, POOLED, ("FID", "Frechet distance"))
SFID = FrechetMetric("spatial_frechet_distance", SPATIAL, ("sFID", "Spatial Frechet distance"))
