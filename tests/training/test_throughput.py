"""The status line of a run, and what counts as training."""

import json

import pytest
import torch as th

from cm.logging import logger
from cm.training.throughput import Ticks, spell_time, status_line
from support.training import BATCH, loop


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
