"""Durations in images: what they are in steps, half-lives against EDM's formula, and the status line."""

import json
import math

import numpy as np
import pytest
import torch as th

from cm.checkpoints import manifest
from cm.config.flags import parse
from cm.config.schema import RunConfig, TrainConfig
from cm.errors import UserError
from cm.logging import logger
from cm.setup.durations import resolve_durations, steps_of
from cm.training.ema_rates import EmaRate, parse_rates
from cm.training.loop import as_batch
from cm.training.optimizer import rampup
from cm.training.throughput import Ticks, spell_time, status_line
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


# ---- the status line ----


def test_ticks_leave_a_line_and_an_object_each(images, tmp_path, capsys):
    def train(total):
        training = loop(images, tmp_path, total, log_interval=2, with_ticks=True)
        logger.configure(str(tmp_path), ["stdout"], rank=0, also=["stats"])
        training.run_loop()

    train(3)
    train(5)                                                                # goes on, and does tick 2 again
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tick ")]
    assert [line.split()[:4] for line in lines] == [
        ["tick", str(tick), "kimg", "0.0"] for tick in (1, 2, 2, 3)
    ]
    assert all(word in lines[0] for word in ("sec/tick", "sec/kimg", "maintenance", "cpumem", "gpumem", "reserved"))
    objects = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in objects] == [2, 3, 4, 5]
    assert [row["Progress/kimg"]["mean"] for row in objects] == [step * BATCH / 1000 for step in (2, 3, 4, 5)]
    assert objects[0]["Loss/loss"]["mean"] > 0 and objects[0]["Progress/cpumem_gib"]["mean"] > 0.01
    assert objects[0]["timestamp"] > 1e9


def test_maintenance_is_not_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cm.training.throughput.time.monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    ticks = Ticks(4, 2, th.device("cpu"))
    passes(3)
    with ticks.maintenance():                                               # amid a tick
        passes(10)
    passes(1)
    row = ticks.end(6, 500)
    assert (row["tick"], row["kimg"]) == (3, 3)
    assert (row["sec_per_tick"], row["sec_per_kimg"], row["maintenance_sec"]) == (4, 4, 10)
    with ticks.maintenance():
        passes(5)
    passes(2)
    row = ticks.end(7, 500)
    assert (row["tick"], row["sec_per_tick"], row["sec_per_kimg"], row["maintenance_sec"]) == (4, 2, 4, 5)
    assert row["time_sec"] == 21
    assert status_line(row).startswith("tick 4     kimg 3.5       time 21s          sec/tick 2.0 ")


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0s"), (59.6, "1m 00s"), (3725, "1h 02m 05s"), (90_061, "1d 01h 01m"),
])
def test_times_for_people(seconds, text):
    assert spell_time(seconds) == text
