"""Rates of averages: half-lives in images against EDM's formula, and the loop that averages by them."""

import math

import pytest
import torch as th

from cm.checkpoints import manifest
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
    assert parse_rates("0.9999, 0", 0.05)[0].decay(0, 512) == 0.9999
    assert parse_rates("0.9999, 0", 0.05)[1].decay(7, 512) == 0


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
    assert manifest.parse_name(name) == ("ema_0.016kimg", 5)
    saved, again = ((tmp_path / run / name).read_bytes() for run in "bc")
    assert saved == again
    assert set(manifest.newest(str(tmp_path / "b")).names()) == {"model", "opt", "trainer", "ema_0.5", "ema_0.016kimg"}
