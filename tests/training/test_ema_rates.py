"""Rates of averages: half-lives in images against EDM's formula, and the loop that averages by them."""

import math

import pytest
import torch as th

from cm.checkpoints import averages, file_names, manifest
from cm.errors import UserError
from cm.logging import logger
from cm.training.ema_rates import EmaRate, parse_rates
from cm.training.loop import as_batch
from support.training import BATCH, loop, run


@pytest.mark.parametrize("words", ["2", "x", "-0.1", "0kimg", "infkimg", "kimg", "0.9,nan"])
def test_what_is_no_rate(words):
    with pytest.raises(UserError, match="is not a decay rate in .* or a half-life such as 500kimg"):
        parse_rates(words)


def test_decay_against_its_definition():
    """Over h images a weight that no longer changes loses half of its distance; the ramp is EDM's."""
    rate, = parse_rates("0.5kimg")
    assert str(rate) == "0.5kimg"
    assert math.prod(rate.decay(n, 20) for n in range(0, 500, 20)) == pytest.approx(0.5, rel=1e-12)
    ramped = EmaRate("500kimg", 0.05)
    assert ramped.decay(0, 512) == 0                                        # the first step copies
    for seen in (512, 10_240, 9_999_999, 10_000_000, 90_000_000):
        assert ramped.decay(seen, 512) == 0.5 ** (512 / min(500_000, 0.05 * seen))
    for seen in (512, 10_240, 70_000_000, 71_000_000):
        assert parse_rates("0.9999", 0.05)[0].decay(seen, 512) == min(0.9999, 0.5 ** (512 / (0.05 * seen)))
    assert parse_rates("0.9999, 0", 0.05)[1].decay(7, 512) == 0
    assert parse_rates("0.9999", 0)[0].decay(0, 512) == 0.9999              # the original's


def weights_of_iterates(rate, ratio, steps, batch=2048):
    """The weight of the initial weights, and the effective number of iterates in an average, 1 / sum w^2."""
    own, kept, squares, step, last = EmaRate(rate, ratio), 1.0, 0.0, 0, float(rate)
    while step < steps and (decay := own.decay(step * batch, batch)) < last:
        kept, squares, step = kept * decay, squares * decay**2 + (1 - decay) ** 2, step + 1
    rest = last ** (steps - step)                                           # the warm-up is over
    kept, squares = kept * rest, squares * rest**2 + (1 - last) ** 2 * (1 - rest**2) / (1 - last**2)
    return kept, 1 / (squares + kept**2)


@pytest.mark.parametrize("rate, steps", [
    ("0.999", 600_000), ("0.9999", 600_000), ("0.9999432189950708", 600_000), ("0.9999", 800_000), ("0.99929", 400_000),
])
def test_published_runs_of_full_length_have_the_averages_of_runs_without_warm_up(rate, steps):
    """The initial weights are gone either way, and the average is as long: it differs by less than 1e-6."""
    kept, length = weights_of_iterates(rate, 0.05, steps)
    plain_kept, plain_length = weights_of_iterates(rate, 0, steps)
    assert kept == 0 and plain_kept < 1e-14
    assert length == pytest.approx(plain_length, rel=1e-6)
    assert plain_length == pytest.approx((1 + float(rate)) / (1 - float(rate)), rel=1e-6)       # the closed form


def test_a_short_run_has_an_average_of_its_own_last_steps():
    """868 steps at 0.999: 42 % of the initial weights without a warm-up, none with it."""
    assert weights_of_iterates("0.999", 0, 868)[0] == pytest.approx(0.999**868, rel=1e-9)
    kept, length = weights_of_iterates("0.999", 0.05, 868)
    assert kept == 0 and 100 < length < 200


def test_the_loop_records_the_share_of_the_initial_weights(images, tmp_path):
    """Without and with warm-up, over a restart; the first step copies."""
    for ratio, expected in ((0.0, 0.9**3), (0.05, 0.0)):
        folder = tmp_path / str(ratio)
        run(images, folder, 2, ema_rate="0.9", ema_rampup_ratio=ratio)
        training = run(images, folder, 3, ema_rate="0.9", ema_rampup_ratio=ratio)
        assert training.averages.initial_weight == pytest.approx([expected], rel=1e-12)
        saved = manifest.newest(str(folder))
        assert saved.initial_weight == {"ema_0.9": training.averages.initial_weight[0]}
        assert averages.is_immature(saved, "ema_0.9") == (ratio == 0)
    training.averages.restart()
    assert training.averages.initial_weight == [1]


def test_the_loop_averages_by_half_life_and_names_its_files(images, tmp_path):
    """Against the average written out; resumed, the run is the same."""
    rates = "0.5,0.016kimg"
    training = loop(images, tmp_path / "a", 5, ema_rate=rates, ema_rampup_ratio=0.5)
    slow = None
    for step in range(5):
        training.run_step(as_batch(next(training.data), training.step, 0, 1))
        now = [param.detach().clone().double() for param in training.trainer.master_params]
        halflife = min(16, 0.5 * step * BATCH)
        beta = 0.5 ** (BATCH / halflife) if halflife else 0
        slow = now if step == 0 else [beta * old + (1 - beta) * new for old, new in zip(slow, now)]
    for ours, expected in zip(training.ema_params[1], slow):
        th.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6)
    logger.reset()
    run(images, tmp_path / "b", 5, ema_rate=rates, ema_rampup_ratio=0.5)
    run(images, tmp_path / "c", 2, ema_rate=rates, ema_rampup_ratio=0.5)
    run(images, tmp_path / "c", 5, ema_rate=rates, ema_rampup_ratio=0.5)
    name = "ema_0.016kimg_000005.pt"
    assert file_names.parse_name(name) == ("ema_0.016kimg", 5)
    saved, again = ((tmp_path / run / name).read_bytes() for run in "bc")
    assert saved == again
    assert set(manifest.newest(str(tmp_path / "b")).names()) == {"model", "opt", "trainer", "ema_0.5", "ema_0.016kimg"}
