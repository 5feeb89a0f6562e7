"""Moments and the Frechet distance: golden values, closed forms, and what they refuse.

Golden tolerances: float64 sums in another order differ by about 1e-15 relative, so 1e-9 and 1e-12 hold on any machine.
The rank-deficient distance contains square roots of rounding noise, which differ by 5e-8 between builds of LAPACK.
"""

import numpy as np
import pytest

from evaluations.metrics.frechet import Moments, frechet, frechet_distance
from support.golden_metrics import GOLDEN, expected, golden


def moments(features):
    m = Moments(features.shape[1])
    m.update(features)
    return m


# --- mean and covariance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features, suffix", [("features", ""), ("spatial", "_s")])
@pytest.mark.parametrize("side", ["ref", "sample"])
def test_moments_are_golden_in_any_batches(features, suffix, side):
    x = GOLDEN[f"{features}_{side}"]
    m = Moments(x.shape[1])
    for batch in np.array_split(x, [3, 100, 101, 350]):
        m.update(batch)
    mu, sigma = m.finalize()
    np.testing.assert_allclose(mu, GOLDEN[f"mu{suffix}_{side}"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(sigma, GOLDEN[f"sigma{suffix}_{side}"], rtol=0, atol=1e-13)


def test_moments_of_added_sums_are_those_of_the_whole():
    x = np.random.default_rng(0).normal(2, 3, (90, 5))
    parts = [moments(part) for part in np.array_split(x, 4)]
    total = parts[0].with_sums([sum(column) for column in zip(*(part.sums() for part in parts))])
    assert total.n == 90
    mu, sigma = total.finalize()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-12)


def test_moments_accumulate_float32_features_in_float64():
    x = (1000 + np.random.default_rng(1).normal(size=(5000, 3))).astype(np.float32)
    mu, sigma = moments(x).finalize()
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), atol=1e-8)    # float32 is 0.1 off


def test_moments_refuse_what_they_cannot_use():
    m = moments(np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least 2 points, not 1"):
        m.finalize()
    with pytest.raises(ValueError, match="4 dimensions; these moments were begun with 3"):
        m.update(np.ones((2, 4)))
    with pytest.raises(ValueError, match="not all finite"):
        m.update(np.array([[1, np.nan, 2]]))
    with pytest.raises(ValueError, match="of shape"):
        m.update(np.ones(3))
    assert m.n == 1


# --- Frechet distance ----------------------------------------------------------------------------------------------


def test_frechet_distances_are_golden():
    fid = frechet_distance(*golden("mu_ref", "sigma_ref", "mu_sample", "sigma_sample"))
    sfid = frechet_distance(*golden("mu_s_ref", "sigma_s_ref", "mu_s_sample", "sigma_s_sample"))
    assert fid == pytest.approx(expected("fid"), abs=1e-9)
    assert sfid == pytest.approx(expected("sfid"), abs=1e-9)


def test_frechet_distance_from_features_is_golden():
    ref, sample = (moments(x).finalize() for x in golden("features_ref", "features_sample"))
    assert frechet_distance(*ref, *sample) == pytest.approx(expected("fid"), abs=1e-9)


def test_fewer_points_than_dimensions_are_finite_and_golden():
    ref, sample = (moments(x[:40]).finalize() for x in golden("features_ref", "features_sample"))
    assert frechet_distance(*ref, *sample) == pytest.approx(expected("fid_first40_vs_first40"), abs=1e-6)


def test_commuting_gaussians_have_a_closed_form():
    mu1, mu2, var1, var2 = golden("diag_mu1", "diag_mu2", "diag_var1", "diag_var2")
    closed = np.square(mu1 - mu2).sum() + np.square(np.sqrt(var1) - np.sqrt(var2)).sum()
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))[0]
    turned = [rotation @ m for mu, var in ((mu1, var1), (mu2, var2)) for m in (mu, np.diag(var) @ rotation.T)]
    assert closed == pytest.approx(expected("fid_diag_closed_form"), abs=1e-9)
    assert frechet_distance(mu1, np.diag(var1), mu2, np.diag(var2)) == pytest.approx(closed, abs=1e-9)
    assert frechet_distance(*turned) == pytest.approx(closed, abs=1e-9)


def test_two_by_two_covariances_have_a_closed_form():
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    # for 2x2, (Tr sqrt(AB))^2 = Tr AB + 2 sqrt(det AB)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    zero = np.zeros(2)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, abs=1e-12)


def test_frechet_distance_is_symmetric_and_zero_of_equal_sets():
    mu1, sigma1, mu2, sigma2 = golden("mu_ref", "sigma_ref", "mu_sample", "sigma_sample")
    forward, backward = frechet_distance(mu1, sigma1, mu2, sigma2), frechet_distance(mu2, sigma2, mu1, sigma1)
    assert forward == pytest.approx(backward, abs=1e-9)
    assert frechet_distance(mu1, sigma1, mu1, sigma1) == pytest.approx(0, abs=1e-9)


def test_frechet_reports_its_parts_and_what_it_clipped():
    mu1, sigma1, mu2, sigma2 = golden("mu_ref", "sigma_ref", "mu_sample", "sigma_sample")
    parts = frechet(mu1, sigma1, mu2, sigma2)
    assert parts.mean_term == pytest.approx(np.square(mu1 - mu2).sum(), rel=1e-12)
    assert parts.distance == pytest.approx(parts.mean_term + parts.covariance_term, rel=1e-12)
    assert parts.clipped < 1e-12
    damaged = np.diag([1.0, 1.0, -0.5])
    assert frechet(np.zeros(3), damaged, np.zeros(3), np.eye(3)).clipped == pytest.approx(0.2)
    assert frechet(np.zeros(3), np.eye(3), np.zeros(3), damaged).clipped == pytest.approx(0.2)


def test_frechet_refuses_unlike_or_broken_gaussians():
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        frechet(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="first Gaussian: mu must be"):
        frechet(np.zeros(2), np.eye(3), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="second Gaussian: mu or sigma is not finite"):
        frechet(np.zeros(1), np.eye(1), np.zeros(1), np.full((1, 1), np.inf))
