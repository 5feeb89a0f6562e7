"""Features that lie on several ranks, in uneven shares and small blocks, give the numbers of one process."""

import json

import numpy as np
import pytest

from evaluations.metrics.kid import kid, kid_of_sets
from evaluations.metrics.points import PointSet
from evaluations.metrics.precision_recall import precision_recall, precision_recall_of_sets
from support.golden_metrics import expected, golden
from support.warm import mpi_program

DTYPES = ("float32", "float64", "float16")


def points(seed, count):
    return np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32) * (1 + seed / 4)


@pytest.mark.mpi
def test_three_ranks_one_of_them_without_points(tmp_path):
    np.savez(tmp_path / "points.npz", ref=points(0, 50), sample=points(1, 37))
    done = mpi_program(tmp_path, 3, f"""
        import json
        import numpy as np
        from cm.distributed import setup as dist
        from evaluations.engine.ranks import JobRanks
        from evaluations.metrics.kid import kid_of_sets
        from evaluations.metrics.points import PointSet
        from evaluations.metrics.precision_recall import precision_recall_of_sets

        def share(all_points, ranks):
            order = np.random.default_rng(2).permutation(len(all_points))
            mine = {{0: order[:20], 1: order[:0], 2: order[20:]}}[ranks.rank]
            return PointSet(all_points[mine], mine, len(all_points), ranks)

        def main():
            dist.setup_dist()
            ranks = JobRanks()
            with np.load("{tmp_path}/points.npz") as file:
                ref, sample = (share(file[name], ranks) for name in ("ref", "sample"))
            found = {{dtype: precision_recall_of_sets(ref, sample, 3, dtype=dtype, block=7) for dtype in {DTYPES}}}
            found["kid"] = kid_of_sets(ref, sample, 10, 20, 0)[:2]
            assert ranks.gather(found) == [found] * 3
            if dist.is_main():
                print(json.dumps(found))

        dist.run(main)
    """)
    assert done.rc == 0, done
    found, (ref, sample) = json.loads(done.stdout), (points(0, 50), points(1, 37))
    for dtype in DTYPES:
        assert tuple(found[dtype]) == precision_recall(ref, sample, 3, dtype=dtype, block=11), dtype
    assert found["kid"] == pytest.approx(kid(ref, sample, 10, 20, 0)[:2], rel=1e-12)


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
