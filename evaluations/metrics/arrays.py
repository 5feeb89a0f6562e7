"""The inputs of the metrics, checked: arrays of features and Gaussians."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def as_points(points: Array, what: str, dtype: Any = None) -> Array:
    """The features [N,D] of N images, as `dtype` if that is given.

    :param what: their name in messages.
    :raises ValueError: if they are empty, have another number of axes, or are not finite.
    """
    points = np.asarray(points, dtype)
    if points.ndim != 2 or not points.size:
        raise ValueError(f"{what} must be [points, dimensions], neither of them 0, not of shape {points.shape}")
    if not np.isfinite(points.sum(dtype=np.float64)):
        raise ValueError(f"{what} are not all finite")
    return points


def as_pair(ref: Array, sample: Array, dtype: Any = None) -> tuple[Array, Array]:
    """The features ref [N,D] and sample [M,D] of two sets.

    :raises ValueError: for the reasons of `as_points`, or if their dimensions differ.
    """
    ref, sample = as_points(ref, "reference points", dtype), as_points(sample, "samples", dtype)
    if ref.shape[1] != sample.shape[1]:
        raise ValueError(f"reference has {ref.shape[1]} dimensions, samples {sample.shape[1]}: not the same features")
    return ref, sample


def as_gaussian(mu: Array, sigma: Array, which: str) -> tuple[Array, Array]:
    """mu [D] and sigma [D,D] in float64.

    :param which: name of the Gaussian in messages.
    :raises ValueError: if the shapes do not fit or a value is not finite.
    """
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{which} Gaussian: mu must be [D] and sigma [D,D], not {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{which} Gaussian: mu or sigma is not finite")
    return mu, sigma
