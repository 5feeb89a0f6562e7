"""The fault campaign in short: one run through each fault once (`make soak` goes on for as long as one likes)."""

import random
import re
import shlex

import pytest

from support import mpi, warm
from support.mpi import ROOT
from system.soak import FAULTS, Run, differing_bytes, small_disk


@pytest.mark.mpi
def test_each_fault_once_and_the_run_ends_with_the_same_bytes(tmp_path):
    options = ["--minutes", "0", "--seed", "1", "--faults", "0", "--python", shlex.join(warm.python_words())]
    done = mpi.python([str(ROOT / "tests/system/soak.py"), *options], timeout=240)
    assert done.rc == 0, done
    with small_disk(tmp_path / "disk") as why_not:
        expected = {name for name in FAULTS if name != "full disk" or not why_not}
    assert "full disk: skipped, needs root" in done.stdout or not why_not, done
    assert set(re.findall(r"^  ([\w -]+): .*, started at step", done.stdout, re.M)) == expected, done
    assert "run 0: 0 bytes differ" in done.stdout and done.stdout.rstrip().endswith("; bytes differing: 0"), done


def test_bytes_that_differ_are_counted():
    assert differing_bytes({"a": b"123", "b": b"1"}, {"a": b"123", "b": b"1"}) == 0
    assert differing_bytes({"a": b"123"}, {"a": b"193"}) == 1
    assert differing_bytes({"a": b"12"}, {"a": b"193"}) == 2
    assert differing_bytes({"a": b"12"}, {"a": b"12", "b": b"123"}) == 3


def test_a_run_resumes_from_complete_checkpoints_alone(tmp_path):
    """Of every tenth one the averages stay: the campaign must not damage the only one that is complete."""
    run = Run(tmp_path, random.Random(0))
    (run.log_dir / "opt000060.dcp").mkdir()
    for name in ("checkpoint_000050.json", "ema_0.9_000050.pt", "checkpoint_000055.json", "opt000055.pt",
                 "checkpoint_000060.json", "opt000060.dcp/__0_0.distcp", "opt000065.pt"):
        (run.log_dir / name).touch()
    assert run.resumable() == 2
