"""Precision and recall: golden point by point, in blocks, in half precision, and on sets whose overlap is known."""

import tracemalloc

import numpy as np
import pytest

from evaluations.metrics.points import PointSet
from evaluations.metrics.precision_recall import BLOCK, Distances, manifold_hits, manifold_radii, precision_recall
from support.golden_metrics import GOLDEN, expected, golden

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
    radii = [
        manifold_radii(PointSet(x.astype(np.float64)), 3, Distances(x.astype(np.float64).mean(0), np.float64, block))
        for x in (ref, sample)
    ]
    np.testing.assert_allclose(radii[0], GOLDEN["radii_sq_ref_k3"], rtol=1e-12)
    np.testing.assert_allclose(radii[1], GOLDEN["radii_sq_sample_k3"], rtol=1e-12)
    distances = Distances(ref.mean(0), np.float32, block)
    hits = manifold_hits(PointSet(ref), radii[0], PointSet(sample), radii[1], distances)
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
    points = PointSet(twins.astype(np.float64))
    np.testing.assert_allclose(manifold_radii(points, 3, Distances(points.mean(), np.float64, BLOCK)), 0, atol=1e-12)


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
