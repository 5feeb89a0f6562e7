"""The metrics against those of torch-fidelity, an implementation by others, on the same features.

Both compute in float64 from the same rows, so they differ by the rounding of sums in another order, 1e-16 of each of
some thousand terms: 1e-11 relative. Where more than that is allowed, the test says why.
"""

import numpy as np
import pytest
import torch as th

from cm.io.torchvision_shim import import_torchvision
from evaluations.metrics.frechet import Moments, frechet_distance
from evaluations.metrics.inception_score import inception_score
from evaluations.metrics.kid import kid, squared_mmd
from evaluations.metrics.precision_recall import precision_recall
from support.golden_metrics import GOLDEN

import_torchvision()                                        # torch-fidelity wants it, whatever it is to compute

MISSING = "no torch-fidelity, which is there for this comparison alone: pip install torch-fidelity==0.4.0"
metric_fid = pytest.importorskip("torch_fidelity.metric_fid", reason=MISSING)
metric_isc = pytest.importorskip("torch_fidelity.metric_isc", reason=MISSING)
metric_kid = pytest.importorskip("torch_fidelity.metric_kid", reason=MISSING)
metric_prc = pytest.importorskip("torch_fidelity.metric_prc", reason=MISSING)

def golden_sets():
    """[500,64] float64 each."""
    return GOLDEN["features_ref"].astype(np.float64), GOLDEN["features_sample"].astype(np.float64)


def clustered_sets():
    """Two overlapping mixtures of unequal sizes, away from 0 as Inception's features are, with unequal spreads."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, 2, (6, 40))

    def draw(n, first, last, spread):
        x = centres[rng.integers(first, last, n)] + spread * rng.normal(size=(n, 40)) * np.linspace(0.2, 1, 40)
        return np.abs(x)

    return draw(420, 0, 5, 0.5), draw(310, 1, 6, 0.6)


SETS = {"golden": golden_sets, "clustered": clustered_sets}
each_pair_of_sets = pytest.mark.parametrize("sets", SETS.values(), ids=SETS)


def our_fid(ref, sample):
    gaussians = []
    for features in (ref, sample):
        moments = Moments(features.shape[1])
        for batch in np.array_split(features, 7):
            moments.update(batch)
        gaussians += moments.finalize()
    return frechet_distance(*gaussians)


def their_fid(ref, sample):
    statistics = [metric_fid.fid_features_to_statistics(th.from_numpy(features)) for features in (sample, ref)]
    return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]


@each_pair_of_sets
def test_frechet_distances_agree(sets):
    ref, sample = sets()
    assert our_fid(ref, sample) == pytest.approx(their_fid(ref, sample), rel=1e-10)
    assert our_fid(ref, sample) > 0.1


@each_pair_of_sets
def test_frechet_distances_of_fewer_points_than_dimensions_agree(sets):
    """Eigenvalues that are 0 come out at about 1e-16 of the largest, and their roots at 1e-8 of its root, some dozens
    of them; they take the roots of what is negative to be imaginary and 0, as here."""
    ref, sample = (points[:30] for points in sets())
    assert our_fid(ref, sample) == pytest.approx(their_fid(ref, sample), rel=1e-6)


@each_pair_of_sets
def test_frechet_distances_of_float32_features_agree_to_float32(sets):
    """They leave the means in float32, which is 1e-7 of each coordinate; here sums are float64."""
    ref, sample = (points.astype(np.float32) for points in sets())
    theirs = their_fid(ref, sample)
    assert our_fid(ref, sample) == pytest.approx(theirs, rel=1e-5)
    assert our_fid(ref, sample) == pytest.approx(our_fid(*(x.astype(np.float64) for x in (ref, sample))), rel=1e-12)


@each_pair_of_sets
@pytest.mark.parametrize("subsets, subset_size, seed", [(10, 100, 2020), (3, 300, 7)])
def test_kernel_distances_of_the_same_subsets_agree(sets, subsets, subset_size, seed):
    """The draws are the same, so each subset's value is: with them the mean and the spread."""
    ref, sample = sets()
    theirs = metric_kid.kid_features_to_metric(
        th.from_numpy(sample), th.from_numpy(ref), kid_subsets=subsets, kid_subset_size=subset_size, rng_seed=seed,
        verbose=False,
    )
    ours = kid(ref, sample, subsets=subsets, subset_size=subset_size, seed=seed)
    # Kernels of some hundred cancel to a distance of about 0.1.
    assert ours.mean == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-10, abs=1e-12)
    assert ours.std == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_STD], rel=1e-9, abs=1e-12)
    assert ours.std > 0


@each_pair_of_sets
def test_the_discrepancy_of_whole_sets_agrees(sets):
    ref, sample = (points[:300] for points in sets())
    assert squared_mmd(sample, ref) == pytest.approx(metric_kid.kernel_mmd(sample, ref), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("splits", [1, 5, 10])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["as they are", "certain"])
def test_inception_scores_agree_split_by_split(splits, scale):
    """They cut a set into so many splits, here a split has so many images: the same where these divide the set."""
    logits = GOLDEN["logits_sample"] * scale
    theirs = metric_isc.isc_features_to_metric(th.from_numpy(logits), splits, shuffle=False)
    ours = inception_score(logits, len(logits) // splits)
    assert ours == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_MEAN], rel=1e-11)
    assert ours > 1.01


def test_inception_scores_in_their_shuffled_order_agree():
    logits = GOLDEN["logits_sample"]
    theirs = metric_isc.isc_features_to_metric(th.from_numpy(logits), 10, shuffle=True, rng_seed=2020)
    order = np.random.RandomState(2020).permutation(len(logits))
    expected = theirs[metric_isc.KEY_METRIC_ISC_MEAN]
    assert inception_score(logits[order], len(logits) // 10) == pytest.approx(expected, rel=1e-11)
    assert inception_score(logits, len(logits) // 10) != pytest.approx(expected, rel=1e-6)


@each_pair_of_sets
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("in_parts", [False, True])
def test_precision_and_recall_agree(sets, k, in_parts):
    """To the point: no decision lies within rounding of its radius. They average in float32, which is 1e-7."""
    ref, sample = sets()
    theirs = metric_prc.prc_features_to_metric(
        th.from_numpy(sample), th.from_numpy(ref), prc_neighborhood=k, prc_batch_size=64, save_cpu_ram=in_parts,
        verbose=False,
    )
    expected = (theirs[metric_prc.KEY_METRIC_PRECISION], theirs[metric_prc.KEY_METRIC_RECALL])
    for dtype in (np.float32, np.float64):
        assert precision_recall(ref, sample, k, dtype=dtype) == pytest.approx(expected, abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-3, "sets on which it matters which of the two is called precision"
