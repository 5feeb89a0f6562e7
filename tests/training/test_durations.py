"""Durations in images: what they are in steps, and half-lives against EDM's formula."""

import math

import numpy as np
import pytest
import torch as th

from cm.checkpoints import manifest
from cm.config.flags import parse
from cm.config.schema import RunConfig, TrainConfig
from cm.errors import UserError
from cm.logging import logger
from cm.training.durations import EmaRate, parse_rates, rampup, resolve_durations, steps_of
from cm.training.loop import as_batch
from support.training import BATCH, loop, run


def resolved(*argv, batch=512):
    settings = parse("", TrainConfig, RunConfig, argv=[str(word) for word in argv])
    resolve_durations(settings, batch)
    return settings


def steps(*argv, batch=512):
    values = resolved(*argv, batch=batch).values
    return [values[name] for name in ("total_training_steps", "log_interval", "save_interval", "ema_rate")]


@pytest.mark.parametrize(("kimg", "batch", "count"), [
    (200_000, 512, 390_625), (50, 512, 98), (0.512, 512, 1), (0.513, 512, 2), (0.001, 512, 1), (0.3, 3, 100),
])
def test_steps_are_the_least_that_show_so_many_images(kimg, batch, count):
    assert steps_of(kimg, batch) == count


def test_flags_of_edm_become_steps():
    assert steps() == [0, 10, 10000, "0.9999"]
    assert steps("--total_kimg", 200_000, "--tick", 50, "--snap", 50, "--dump", 500, "--ema_halflife_kimg", 500) == [
        390_625, 98, 4900, "500kimg"
    ]
    assert steps("--tick", 50, "--snap", 50, "--dump", 10)[2] == 980        # the more frequent of both
    assert steps("--tick", 50, "--dump", 10)[2] == 980
    assert steps("--ema_rate", "0.999,0.9999", "--ema_halflife_kimg", 0.5)[3] == "0.999,0.9999,0.5kimg"


@pytest.mark.parametrize(("argv", "message"), [
    (["--total_kimg", 100, "--total_training_steps", 7],
     "--total_training_steps asks for total_training_steps=7, and --total_kimg for total_kimg=100.0, which at 512 "
     "images a step is total_training_steps=196: give one"),
    (["--tick", 1, "--log_interval", 10], "log_interval=10, and --tick"),
    (["--tick", 1, "--snap", 2, "--save_interval", 10], "save_interval=10, and --snap for snapshot_ticks=2"),
    (["--snap", 2], "--snapshot_ticks and --state_dump_ticks count ticks: give --tick_kimg"),
])
def test_steps_and_images_at_once_are_an_error(argv, message):
    with pytest.raises(UserError, match=message):
        resolved(*argv)


def test_a_resolved_run_is_read_back_and_the_command_line_wins(tmp_path):
    argv = ["--total_kimg", 100, "--tick", 1, "--snap", 3, "--ema_halflife_kimg", 2]
    first, file = resolved(*argv), tmp_path / "config.json"
    file.write_text(first.as_text())
    assert resolved("--config", file).values == first.values
    assert steps("--config", file, "--total_training_steps", 7) == [7, 2, 6, "2kimg"]
    assert steps("--config", file, "--total_kimg", 10)[0] == 20
    with pytest.raises(UserError, match="config.json asks for .*give one of them on the command line"):
        resolved("--config", file, batch=100)


# ---- averages ----


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


def test_the_learning_rate_rises_over_images(images, tmp_path):
    training, rates = loop(images, tmp_path, 6, lr_rampup_kimg=0.032), []
    for _ in range(6):
        training.run_step(as_batch(next(training.data), training.step, 0, 1))
        rates.append(training.opt.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3], rtol=1e-12)
    assert rampup(0, 0) == 1
