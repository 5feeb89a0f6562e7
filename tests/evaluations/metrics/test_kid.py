"""The kernel distance: golden values, and its definition term by term."""

import numpy as np
import pytest

from evaluations.metrics.kid import kid, squared_mmd
from support.golden_metrics import GOLDEN, expected, golden


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
