"""The metrics of points in shares over ranks."""

import numpy as np
import pytest

from evaluations.engine.over_ranks import Share, kid_over_ranks, precision_recall_over_ranks
from support.golden_metrics import expected, golden


@pytest.mark.parametrize("block", [7, 90, 2048])
def test_points_in_a_share_give_the_same_numbers(block):
    """The function for several ranks on one; test_th_evaluator.py has several."""
    shares = []
    for points in golden("features_ref", "features_sample"):
        order = np.random.default_rng(0).permutation(len(points))               # a share may lie in any order
        shares.append(Share(points[order], order, len(points)))
    for k in (1, 3, 5):
        result = precision_recall_over_ranks(*shares, k, block)
        assert result == (expected(f"precision_k{k}"), expected(f"recall_k{k}"))
    result = kid_over_ranks(*shares, 10, 100, 2020)
    assert result.mean == pytest.approx(expected("kid_mean_10x100_seed2020"), abs=1e-12)
    assert result.std == pytest.approx(expected("kid_std_10x100_seed2020"), abs=1e-12)
    with pytest.raises(ValueError, match="k=500 must lie between 1 and the smaller set's size - 1"):
        precision_recall_over_ranks(*shares, 500, block)
