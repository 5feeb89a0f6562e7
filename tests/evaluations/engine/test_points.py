"""Features that lie on several ranks, in uneven shares and small blocks, give the numbers of one process."""

import json

import numpy as np
import pytest

from evaluations.metrics.kid import kid
from evaluations.metrics.precision_recall import precision_recall
from support.mpi import mpi_program

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
