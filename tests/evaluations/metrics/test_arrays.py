"""What the metrics refuse to compute with."""

import numpy as np
import pytest

from evaluations.metrics.arrays import as_gaussian, as_pair, as_points


@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0), (2, 3, 4)])
def test_points_have_two_axes_and_neither_is_empty(shape):
    with pytest.raises(ValueError, match=r"features must be \[points, dimensions\], neither of them 0, not of shape"):
        as_points(np.ones(shape), "features")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found(bad):
    points = np.ones((50, 20), np.float32)
    points[31, 7] = bad
    with pytest.raises(ValueError, match="features are not all finite"):
        as_points(points, "features")


def test_large_float32_points_are_finite_though_their_float32_sum_is_not():
    points = np.full((4, 4), 3e38, np.float32)
    assert as_points(points, "features") is points


def test_points_keep_their_type_unless_another_is_asked_for():
    assert as_points([[1, 2]], "features", np.float64).dtype == np.float64
    assert as_points(np.ones((1, 2), np.float16), "features").dtype == np.float16


def test_sets_of_different_features_are_no_pair():
    with pytest.raises(ValueError, match="reference has 2 dimensions, samples 3: not the same features"):
        as_pair(np.ones((4, 2)), np.ones((4, 3)))
    with pytest.raises(ValueError, match="samples are not all finite"):
        as_pair(np.ones((4, 2)), np.full((4, 2), np.nan))


def test_a_gaussian_has_a_mean_and_a_square_covariance_in_float64():
    mu, sigma = as_gaussian(np.ones(2, np.float32), np.eye(2, dtype=np.float32), "first")
    assert mu.dtype == sigma.dtype == np.float64
    for mean, covariance in ((np.ones((1, 2)), np.eye(2)), (np.ones(2), np.eye(3)), (np.ones(2), np.ones((2, 3)))):
        with pytest.raises(ValueError, match=r"first Gaussian: mu must be \[D\] and sigma \[D,D\]"):
            as_gaussian(mean, covariance, "first")
    with pytest.raises(ValueError, match="second Gaussian: mu or sigma is not finite"):
        as_gaussian(np.ones(2), np.diag([1, np.nan]), "second")
