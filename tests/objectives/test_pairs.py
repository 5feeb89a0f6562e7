"""How pairs of noise levels are drawn: against the published formulas, written out a second time here."""

import math

import pytest
import torch as th

from cm.errors import UserError
from cm.objectives.pairs import GridPairs, LognormalGridPairs, ShrinkingPairs
from cm.random_util import SampleStreams
from support.objectives import levels

F64 = th.float64
IMAGES = th.zeros(4000, 1, 1)


def fixed(n):
    return lambda step: (0.0, n)


class Quantiles:
    """A noise source whose uniform numbers are given."""

    def __init__(self, *u):
        self.u = th.tensor(u, dtype=F64)

    def rand(self, *shape, dtype=None, device=None):
        assert dtype == F64 and shape == self.u.shape
        return self.u


def test_neighbours_of_the_grid_are_drawn_uniformly():
    t, r = GridPairs(levels, fixed(5)).draw(0, th, IMAGES)
    grid = levels(5, dtype=th.float32)
    index = th.searchsorted(-grid, -t)
    assert th.equal(r, grid[index + 1])
    assert (index.bincount(minlength=4) - 1000).abs().max() < 130   # 4.7 standard deviations of a count


def lognormal_share(upper, lower, mean, std):
    """P(lower < sigma < upper) for ln sigma ~ N(mean, std^2)."""
    return (math.erf((math.log(upper) - mean) / (math.sqrt(2) * std))
            - math.erf((math.log(lower) - mean) / (math.sqrt(2) * std))) / 2


@pytest.mark.parametrize("n", [11, 1281])
def test_an_interval_is_as_likely_as_the_lognormal_says(n):
    pairs = LognormalGridPairs(levels, fixed(n), -1.1, 2.0)
    grid = levels(n).tolist()
    shares = [lognormal_share(upper, lower, -1.1, 2.0) for upper, lower in zip(grid, grid[1:])]
    expected = th.tensor(shares, dtype=F64) / sum(shares)
    th.testing.assert_close(pairs.probabilities(n), expected, rtol=1e-9, atol=1e-15)


def test_the_draw_inverts_the_distribution_function():
    n = 1281
    pairs = LognormalGridPairs(levels, fixed(n))
    ends = pairs.probabilities(n).cumsum(0)
    middles = (ends - pairs.probabilities(n) / 2).tolist()          # the middle of every interval: each drawn once
    t, r = pairs.draw(0, Quantiles(*middles), th.zeros(n - 1, 1, dtype=F64))
    grid = levels(n)
    assert th.equal(t, grid[:-1]) and th.equal(r, grid[1:])
    for u, index in [(0.0, 0), (1 - 2**-53, n - 2)]:
        assert pairs.draw(0, Quantiles(u), th.zeros(1, 1, dtype=F64))[0] == grid[index]


def test_the_grid_becomes_finer_over_the_steps():
    pairs = LognormalGridPairs(levels, lambda step: (0.0, 11 if step < 5 else 21))
    assert [pairs.logs(step)["num_scales"] for step in (0, 4, 5)] == [11, 11, 21]
    t, r = pairs.draw(5, th, IMAGES)
    assert set(t.tolist()) <= set(levels(21, dtype=th.float32).tolist()) and (r < t).all()


@pytest.mark.parametrize("q, stage, share_at_zero, median_gap", [
    (2, 0, 0.81, 1.0), (2, 7, 0.0, 0.0170), (256, 0, 0.0, 0.0170), (4, 3, 0.0, 0.0170),
])
def test_r_follows_t_from_stage_to_stage(q, stage, share_at_zero, median_gap):
    """At q = 2 the first stage is denoising for most draws; q = 2 in 8 stages, 4 in 4 and 256 in 1 end alike."""
    pairs = ShrinkingPairs(q=q, stages=8, stage_steps=10)
    t, r = pairs.draw(10 * stage, Normal(0), th.zeros(20000, 1, dtype=F64))
    n = 1 + 8 / (1 + t.exp())
    th.testing.assert_close(r, th.maximum(th.zeros_like(t), t - t * n / q ** (stage + 1)), rtol=1e-12, atol=1e-12)
    assert (r == 0).double().mean().item() == pytest.approx(share_at_zero, abs=0.01)
    assert ((t - r) / t).median().item() == pytest.approx(median_gap, rel=0.01)
    assert t.log().mean().item() == pytest.approx(-1.1, abs=0.05)
    assert t.log().std().item() == pytest.approx(2.0, rel=0.02)


class Normal:
    """Normal numbers of one seed."""

    def __init__(self, seed):
        self.generator = th.Generator().manual_seed(seed)

    def randn(self, *shape, dtype=None, device=None):
        return th.randn(*shape, dtype=dtype, generator=self.generator)


def test_stages_count_steps_and_the_last_one_stays():
    pairs = ShrinkingPairs(stages=3, stage_steps=4)
    assert [pairs.stage(step) for step in (0, 3, 4, 8, 11, 12, 100)] == [0, 0, 1, 2, 2, 2, 2]


def test_the_length_of_a_stage_comes_from_a_flag_or_fills_the_run():
    flags = {"p_mean": -0.8, "p_std": 1.6, "shrink_q": 4, "shrink_k": 8, "shrink_b": 2, "stages": 4}
    whole = ShrinkingPairs.from_flags(levels, fixed(2), {**flags, "stage_steps": 0, "total_training_steps": 10})
    assert whole == ShrinkingPairs(-0.8, 1.6, 4, 8, 2, 4, 3)
    told = ShrinkingPairs.from_flags(levels, fixed(2), {**flags, "stage_steps": 7, "total_training_steps": 10})
    assert told.stage_steps == 7


@pytest.mark.parametrize("pairs", [
    LognormalGridPairs(levels, fixed(1281)), ShrinkingPairs(), GridPairs(levels, fixed(9)),
])
def test_a_sample_has_its_pair_whatever_the_batch(pairs):
    def draw(*positions):
        return pairs.draw(3, SampleStreams(0, positions, stream="train"), th.zeros(len(positions), 1))

    together, apart = draw(4, 5, 6), draw(6)
    assert all(th.equal(a[2:], b) for a, b in zip(together, apart))


def test_impossible_values():
    with pytest.raises(UserError, match="--p_std 0 is a standard deviation"):
        LognormalGridPairs(levels, fixed(5), p_std=0)
    with pytest.raises(UserError, match="--shrink_q 1: .* must be above 1"):
        ShrinkingPairs(q=1)
    with pytest.raises(UserError, match="at least 2, got 1"):
        GridPairs(levels, lambda step: (0.0, 2 - step)).check(2)
