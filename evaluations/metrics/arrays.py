"""What the metrics take: checked arrays of features and of Gaussians."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[np.floating]


def as_points(points: Array, what: str, dtype: DTypeLike = None) -> Array:
    points = np.asarray(points, dtype)
    if points.ndim != 2 or not points.size:
        raise ValueError(f"{what} must be [points, dimensions], neither of them 0, not of shape {points.shape}")
    if not np.isfinite(points.sum(dtype=np.float64)):
        raise ValueError(f"{what} are not all finite")
    return points


def as_pair(ref: Array, sample: Array, dtype: DTypeLike = None) -> tuple[Array, Array]:
    ref, sample = as_points(ref, "reference points", dtype), as_points(sample, "samples", dtype)
    if ref.shape[1] != sample.shape[1]:
        raise ValueError(f"reference has {ref.shape[1]} dimensions, samples {sample.shape[1]}: not the same features")
    return ref, sample


def as_gaussian(mu: Array, sigma: Array, which: str) -> tuple[Array, Array]:
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{which} Gaussian: mu must be [D] and sigma [D,D], not {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{which} Gaussian: mu or sigma is not finite")
    return mu, sigma
