"""The laws of noise levels: moments, quantiles, unbiased weights, and what their state carries over."""

import math

import pytest
import torch as th

from cm.config.schema import TrainConfig
from cm.diffusion.noise_sampling import (
    SCHEDULE_SAMPLERS,
    LogNormalSampler,
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from cm.diffusion.schedules import VP, iddpm_levels, karras_grid
from cm.karras_diffusion import KarrasDenoiser
from cm.random_util import SampleStreams
from cm.types import NoiseSource

GRID = karras_grid(5, 0.01, 10.0, dtype=th.float32)


def test_torch_is_a_noise_source():
    """`sample` hands torch itself to `draw`."""
    assert isinstance(th, NoiseSource)


def test_lognormal():
    sigma, weight, index = LogNormalSampler(p_mean=-0.4, p_std=2.0).draw(SampleStreams(0, range(20_000)), 20_000, "cpu")
    # The mean of 20000 draws errs by 2 / sqrt(20000) = 0.014, their deviation by 0.010; four times that.
    assert sigma.log().mean().item() == pytest.approx(-0.4, abs=0.06)
    assert sigma.log().std().item() == pytest.approx(2.0, abs=0.04)
    assert (weight == 1).all() and index is None


def test_uniform_draws_levels_of_the_grid():
    sigma, weight, index = UniformSampler(GRID).draw(SampleStreams(0, range(10_000)), 10_000, "cpu")
    assert th.equal(sigma, GRID[index]) and (weight == 1).all()
    # 2000 of 10000 each; the standard deviation of a count is 40.
    assert (index.bincount(minlength=5) - 2000).abs().max() < 160


@pytest.mark.parametrize("name", SCHEDULE_SAMPLERS)
def test_a_sample_keeps_its_noise_level_in_any_batch(name):
    law = create_named_schedule_sampler(name, KarrasDenoiser())
    whole = law.draw(SampleStreams(3, range(8)), 8, "cpu").sigma
    parts = [law.draw(SampleStreams(3, rows), len(rows), "cpu").sigma for rows in (range(3), range(3, 8))]
    assert th.equal(whole, th.cat(parts))


@pytest.mark.parametrize("name", SCHEDULE_SAMPLERS)
def test_named_laws_draw_noise_levels_and_never_indices(name):
    th.manual_seed(0)
    sigma, weight = create_named_schedule_sampler(name, KarrasDenoiser()).sample(1000, "cpu")
    assert sigma.dtype == th.float32 and sigma.shape == weight.shape == (1000,)
    assert (sigma > 0).all() and not (sigma == sigma.round()).all()
    if name in ("uniform", "loss-second-moment"):
        assert set(sigma.tolist()) == set(karras_grid(40, dtype=th.float32).tolist())


def test_the_vp_law_is_uniform_in_its_time():
    t = VP.time(draws("vp").double())
    assert 1e-5 <= t.min() < 1e-3 and 0.999 < t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)          # standard error 0.29 / sqrt(20000) = 0.002
    assert t.quantile(0.25).item() == pytest.approx(0.25, abs=0.015)


def test_the_ve_law_is_uniform_in_the_logarithm():
    u = (draws("ve").log() - math.log(0.02)) / math.log(100 / 0.02)
    assert -1e-5 < u.min() < 1e-3 and 0.999 < u.max() < 1 + 1e-5
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert u.quantile(0.25).item() == pytest.approx(0.25, abs=0.015)


def test_the_iddpm_law_is_uniform_in_its_steps():
    levels = iddpm_levels().float()
    counts = (draws("iddpm")[:, None] == levels).sum(0)
    assert counts.sum() == 20_000 and counts.max() < 50             # 20 each, with a standard deviation of 4.5


def draws(name):
    return create_named_schedule_sampler(name, None).draw(SampleStreams(0, range(20_000)), 20_000, "cpu").sigma


def test_second_moment_is_uniform_until_it_knows_every_level():
    law = LossSecondMomentResampler(GRID, history_per_term=2)
    law.update_with_losses(th.tensor([0, 0, 0, 1, 2, 3, 4]), th.ones(7))
    assert th.equal(law.probabilities(), th.full((5,), 0.2, dtype=th.float64))


def taught(losses: list[float], uniform_prob: float = 0.001) -> LossSecondMomentResampler:
    law = LossSecondMomentResampler(GRID, history_per_term=2, uniform_prob=uniform_prob)
    for loss in ([9.0] * 5, losses, losses):                        # the 9s are forgotten
        law.update_with_losses(th.arange(5), th.tensor(loss))
    return law


def test_second_moment_follows_the_root_mean_square_of_the_last_losses():
    law = LossSecondMomentResampler(GRID, history_per_term=2, uniform_prob=0.1)
    law.update_with_losses(th.arange(5).repeat(2), th.tensor([3.0] * 5 + [4.0, 3.0, 3.0, 3.0, 3.0]))
    rms = th.tensor([math.sqrt(12.5), 3, 3, 3, 3], dtype=th.float64)
    th.testing.assert_close(law.probabilities(), 0.9 * rms / rms.sum() + 0.02)
    th.testing.assert_close(taught([1.0, 2, 3, 4, 5], 0.0).probabilities(), th.arange(1, 6).double() / 15)


def test_second_moment_is_unbiased():
    """The mean of weight * loss is the mean loss over all levels, and draws fall where the law says."""
    losses = th.tensor([1.0, 2, 3, 4, 10])
    law = taught(losses.tolist())
    p = law.probabilities()
    sigma, weight, index = law.draw(SampleStreams(0, range(10_000)), 10_000, "cpu")
    th.testing.assert_close(weight.double(), 1 / (5 * p[index]), rtol=1e-6, atol=0)
    assert (p / (5 * p) * losses).sum().item() == pytest.approx(losses.mean().item())
    counts = index.bincount(minlength=5) / 10_000
    assert (counts - p).abs().max() < 4 * 0.005                     # four standard deviations of a frequency near 1/2
    assert (weight * losses[index]).mean().item() == pytest.approx(4.0, abs=0.01)


def test_index_of_recovers_the_levels():
    law = taught([1.0, 2, 3, 4, 5])
    sigma, _, index = law.draw(SampleStreams(1, range(50)), 50, "cpu")
    assert th.equal(law.index_of(sigma), index)


def test_state_dict_carries_the_history():
    law, fresh = taught([1.0, 2, 3, 4, 5]), LossSecondMomentResampler(GRID, history_per_term=2)
    fresh.load_state_dict(law.state_dict())
    assert th.equal(fresh.probabilities(), law.probabilities())
    for one in (law, fresh):
        one.update_with_losses(th.tensor([0]), th.tensor([7.0]))
    assert th.equal(fresh.probabilities(), law.probabilities())
    with pytest.raises(ValueError, match=r"has \(5, 2\) levels and losses per level, this sampler \(5, 3\)"):
        LossSecondMomentResampler(GRID, history_per_term=3).load_state_dict(law.state_dict())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: create_named_schedule_sampler("log-normal", 40), "unknown schedule_sampler 'log-normal'.*'lognormal'"),
        (lambda: create_named_schedule_sampler("uniform", 40), "needs the noise levels themselves.*got 40"),
        (lambda: UniformSampler([1.0, 0.0]), "needs the noise levels themselves"),
        (lambda: LogNormalSampler(p_std=0), "p_std is a standard deviation and must be positive, got 0"),
        (lambda: LossSecondMomentResampler(GRID, history_per_term=0), "history_per_term must be at least 1, got 0"),
        (lambda: LossSecondMomentResampler(GRID, uniform_prob=2), "uniform_prob is a probability, got 2"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_flag_offers_the_table():
    assert TrainConfig.__dataclass_fields__["schedule_sampler"].metadata["choices"] == tuple(SCHEDULE_SAMPLERS)
