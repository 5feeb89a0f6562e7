"""The numbers of evaluations/metrics.py and manifold.py: golden values, closed forms, and slow plain versions.

Golden tolerances: float64 sums in another order differ by about 1e-15 relative, so 1e-9 and 1e-12 hold on any machine.
The rank-deficient distance contains square roots of rounding noise, which differ by 5e-8 between builds of LAPACK.
"""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from evaluations.metrics.frechet import Moments, frechet, frechet_distance
from evaluations.metrics.inception_score import InceptionScore, inception_score
from evaluations.metrics.kid import kid, kid_of_sets, squared_mmd
from evaluations.metrics.points import PointSet
from evaluations.metrics.precision_recall import (
    manifold_hits,
    manifold_radii,
    precision_recall,
    precision_recall_of_sets,
)

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "golden_metrics.npz", allow_pickle=False)


def expected(name):
    return float(GOLDEN[f"expected_{name}"])


def golden(*names):
    return [GOLDEN[name] for name in names]


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


def test_merged_moments_are_those_of_the_whole():
    x = np.random.default_rng(0).normal(2, 3, (90, 5))
    parts = [moments(part) for part in np.array_split(x, 4)]
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].n == 90
    mu, sigma = parts[0].finalize()
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
    with pytest.raises(ValueError, match="cannot merge moments of 2 and 3"):
        m.merge(Moments(2))
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


# --- Inception Score -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [5000, 500, 100, 120])
def test_inception_score_is_golden(split):
    logits = GOLDEN["logits_sample"]
    score = InceptionScore(split)
    score.update(logits)
    np.testing.assert_allclose(score.per_chunk(), GOLDEN[f"is_per_split_{split}"], rtol=1e-12)
    assert inception_score(logits, split) == pytest.approx(expected(f"inception_score_split{split}"), abs=1e-12)
    assert inception_score(logits.astype(np.float32), split) == pytest.approx(
        expected(f"inception_score_split{split}"), abs=1e-6
    )


def test_inception_score_of_merged_parts_is_that_of_the_whole():
    logits = GOLDEN["logits_sample"]
    parts = [InceptionScore(120) for _ in range(3)]
    for number, start in enumerate(range(0, 500, 64)):              # batches dealt out to three ranks
        parts[number % 3].update(logits[start : start + 64], start)
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].finalize() == pytest.approx(expected("inception_score_split120"), abs=1e-12)


def test_inception_score_has_its_bounds():
    certain = 1000 * np.eye(10)[np.arange(200) % 10]                # e^-1000 underflows: plain p ln p would be NaN
    assert inception_score(certain) == pytest.approx(10, rel=1e-12)
    assert inception_score(np.zeros((50, 10))) == pytest.approx(1, abs=1e-12)
    shift = np.linspace(-700, 700, 500)[:, None]                    # softmax does not see it
    assert inception_score(GOLDEN["logits_sample"] + shift) == pytest.approx(
        expected("inception_score_split5000"), abs=1e-10
    )


def test_inception_score_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="split_size=0"):
        InceptionScore(0)
    with pytest.raises(ValueError, match="at least 1 image"):
        InceptionScore().finalize()
    with pytest.raises(ValueError, match="split_size 10 and 5000"):
        InceptionScore().merge(InceptionScore(10))
    score = InceptionScore()
    score.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="4 classes after logits of 3"):
        score.update(np.zeros((2, 4)))


# --- kernel distance -----------------------------------------------------------------------------------------------


def test_kid_is_golden():
    ref, sample = golden("features_ref", "features_sample")
    result = kid(ref, sample, subsets=10, subset_size=100, seed=2020)
    np.testing.assert_allclose(result.values, GOLDEN["kid_values_10x100_seed2020"], rtol=0, atol=1e-12)
    assert result.mean == pytest.approx(expected("kid_mean_10x100_seed2020"), abs=1e-12)
    assert result.std == pytest.approx(expected("kid_std_10x100_seed2020"), abs=1e-12)
    assert kid(ref, sample, subsets=1, subset_size=500).mean == pytest.approx(expected("kid_full"), abs=1e-12)


def test_squared_mmd_agrees_with_its_definition_and_is_unbiased():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(5, 4))

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    slow = np.mean([kernel(x[i], x[j]) for i in range(6) for j in range(6) if i != j])
    slow += np.mean([kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    slow -= 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert squared_mmd(x, y) == pytest.approx(slow, rel=1e-12)
    draws = [squared_mmd(rng.normal(size=(20, 4)), rng.normal(size=(20, 4))) for _ in range(2000)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(2000)  # one law: 0 within four standard errors


def test_kid_refuses_subsets_larger_than_a_set():
    with pytest.raises(ValueError, match=r"subset_size=1000 .*\(500 reference points, 20 samples\)"):
        kid(GOLDEN["features_ref"], GOLDEN["features_sample"][:20])
    with pytest.raises(ValueError, match="64 dimensions, samples 49"):
        kid(GOLDEN["features_ref"], GOLDEN["spatial_sample"], subset_size=10)


# --- precision and recall ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", [2048, 70])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_golden(k, block, dtype):
    """Exactly: no decision is closer than 3e-4 to its threshold, and float32 errs by 1e-6."""
    result = precision_recall(*golden("features_ref", "features_sample"), k, block=block, dtype=dtype)
    assert result == (expected(f"precision_k{k}"), expected(f"recall_k{k}"))


def test_precision_and_recall_of_sets_of_two_sizes():
    result = precision_recall(GOLDEN["features_ref"][:200], GOLDEN["features_sample"])
    assert result == (expected("precision_k3_ref200"), expected("recall_k3_ref200"))


@pytest.mark.parametrize("block", [500, 130, 64])
def test_radii_and_decisions_are_golden_point_by_point(block):
    ref, sample = golden("features_ref", "features_sample")
    radii = [manifold_radii(x.astype(np.float64), 3, dtype=np.float64, block=block) for x in (ref, sample)]
    np.testing.assert_allclose(radii[0], GOLDEN["radii_sq_ref_k3"], rtol=1e-12)
    np.testing.assert_allclose(radii[1], GOLDEN["radii_sq_sample_k3"], rtol=1e-12)
    hits = manifold_hits(ref, radii[0], sample, radii[1], shift=ref.mean(0), block=block)
    np.testing.assert_array_equal(hits.samples, GOLDEN["sample_in_ref_manifold_k3"])
    np.testing.assert_array_equal(hits.reference, GOLDEN["ref_in_sample_manifold_k3"])


def test_a_far_offset_changes_nothing_in_float32():
    """|u|^2 - 2uv + |v|^2 would cancel: an offset of 100 makes squared norms of 640,000 for distances of about 1."""
    ref, sample = (x.astype(np.float64) + 100 for x in golden("features_ref", "features_sample"))
    assert precision_recall(ref, sample, 3) == (expected("precision_k3"), expected("recall_k3"))


def test_precision_and_recall_do_not_depend_on_the_order():
    rng = np.random.default_rng(4)
    ref, sample = (rng.permutation(x) for x in golden("features_ref", "features_sample"))
    assert precision_recall(ref, sample, 3, block=90) == (expected("precision_k3"), expected("recall_k3"))


def test_equal_sets_overlap_fully_and_distant_ones_not_at_all():
    x = GOLDEN["features_ref"]
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)
    twins = np.repeat(x[:50], 4, axis=0)                            # each has three twins: squared radii of 0
    np.testing.assert_allclose(manifold_radii(twins.astype(np.float64), 3, dtype=np.float64), 0, atol=1e-12)


def test_precision_falls_when_samples_leave_and_recall_when_they_crowd():
    rng = np.random.default_rng(5)
    ref = rng.normal(size=(300, 4))
    strayed = rng.normal(size=(300, 4)) * np.where(np.arange(300) < 150, 1, 8)[:, None]
    crowded = 0.2 * rng.normal(size=(300, 4))
    fair = precision_recall(ref, rng.normal(size=(300, 4)))
    assert precision_recall(ref, strayed).precision < fair.precision - 0.3
    assert precision_recall(ref, crowded).recall < 0.2 < fair.precision <= precision_recall(ref, crowded).precision


def test_memory_of_precision_and_recall_is_bounded():
    """The docstring's 2 block (block + D) numbers, and a tenth for the odds and ends."""
    x = np.random.default_rng(6).normal(size=(3000, 256)).astype(np.float32)
    block = 500
    tracemalloc.start()
    precision_recall(x[:1500], x[1500:], block=block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * 2 * block * (block + 256) * 4 + 3000 * 3 * 4


def test_precision_and_recall_refuse_what_they_cannot_use():
    x = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"k=4 must lie between 1 and the smaller set's size - 1 \(3\)"):
        precision_recall(x, x, 4)
    with pytest.raises(ValueError, match="k=0"):
        precision_recall(x, x, 0)
    with pytest.raises(ValueError, match="samples are not all finite"):
        precision_recall(x, x * np.nan)


# --- in the arithmetic of others, and in parts ---------------------------------------------------------------------


def test_half_precision_gives_guided_diffusions_number():
    """Its evaluator, as shipped, has 0.754 and 0.510 on these sets, where the definition has 0.748 and 0.510."""
    ref, sample = golden("features_ref", "features_sample")
    assert precision_recall(ref, sample, 3, dtype="float16") == (0.754, expected("recall_k3"))
    far = 200 * ref, 200 * sample                           # squares beyond the range of float16
    assert precision_recall(*far, 3, dtype="float16") == (expected("precision_k3"), expected("recall_k3"))


@pytest.mark.parametrize("block", [7, 90, 2048])
def test_points_in_a_share_give_the_same_numbers(block):
    """The function for several ranks on one; test_th_evaluator.py has several."""
    shares = []
    for points in golden("features_ref", "features_sample"):
        order = np.random.default_rng(0).permutation(len(points))               # a share may lie in any order
        shares.append(PointSet(points[order], order, len(points)))
    for k in (1, 3, 5):
        result = precision_recall_of_sets(*shares, k, block=block)
        assert result == (expected(f"precision_k{k}"), expected(f"recall_k{k}"))
    result = kid_of_sets(*shares, 10, 100, 2020)
    assert result.mean == pytest.approx(expected("kid_mean_10x100_seed2020"), abs=1e-12)
    assert result.std == pytest.approx(expected("kid_std_10x100_seed2020"), abs=1e-12)
    with pytest.raises(ValueError, match="k=500 must lie between 1 and the smaller set's size - 1"):
        precision_recall_of_sets(*shares, 500, block=block)
