"""Progress is a bar on a terminal and lines anywhere else."""

import io
import re
import sys

import pytest

from cm.io import progress as module
from cm.io.progress import LINE_SECONDS, progress, say
from support.mpi import ROOT


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on only when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_a_minute_and_a_last_one(capsys, clock):
    bar = progress(title="training", total=400, unit="step")
    bar._time = lambda: clock[0]
    for _ in range(400):                                    # a step a second
        clock[0] += 1.0
        bar.update()
        bar.set_postfix(loss="0.5")
        bar.clear()
    bar.close()
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    assert len(lines) == 400 // LINE_SECONDS + 1
    assert re.match(r"training: 15%, 60 of 400 in .*, .* left, .*step", lines[0])
    assert lines[-1].startswith("training: 100%, 400 of 400") and "loss=0.5" in lines[-1]


def test_what_is_to_leave_nothing_leaves_nothing(capsys, clock):
    assert list(progress(range(9), "evaluation", leave=False)) == list(range(9))
    for _ in progress(range(3), "other", shown=False):
        clock[0] += 100
    assert capsys.readouterr().err == ""


def test_a_length_that_nobody_knows(capsys):
    with progress(iter(range(3)), "reading") as bar:
        assert list(bar) == [0, 1, 2]
    assert re.match(r"reading: 0%, 3 of \?", capsys.readouterr().err)


def test_a_message_is_a_line_of_its_own(capsys):
    with progress(title="converting", total=2) as bar:
        bar.update()
        say("image 0 cannot be read")
        bar.update()
    first, last = capsys.readouterr().err.splitlines()
    assert first == "image 0 cannot be read" and last.startswith("converting: 100%, 2 of 2")


def test_a_terminal_has_a_bar(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    list(progress(range(5), "sampling"))
    assert "\rsampling: 100%|" in stream.getvalue()


def test_nothing_else_in_the_product_makes_a_bar():
    """Two bars of two kinds would not be of one rule. Benchmarks are for the developers' terminals."""
    files = [path for folder in ("cm", "scripts", "evaluations", "datasets") for path in (ROOT / folder).rglob("*.py")]
    found = [path.name for path in files if re.search(r"^\s*(from|import) tqdm", path.read_text(), re.MULTILINE)]
    assert found == ["progress.py"]
