"""Complete checkpoints are converted by the command, and never over others."""

import runpy
import sys

import pytest

from cm.checkpoints import manifest
from cm.errors import UserError
from cm.setup.convert_run import convert_run
from support.mpi import ROOT
from support.training import digest, run


def test_there_and_back_by_the_command(images, tmp_path, monkeypatch):
    run(images, tmp_path / "run", 1)
    convert = runpy.run_path(str(ROOT / "scripts/convert_checkpoint.py"))
    for source, dest, to in ((tmp_path / "run", tmp_path / "dcp", "dcp"),
                             (tmp_path / "dcp" / "checkpoint_000001.json", tmp_path / "back", "files")):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", str(source), str(dest), "--to", to])
        convert["main"](convert["read_flags"]())
    assert sorted(path.name for path in (tmp_path / "dcp").iterdir()) == [
        "checkpoint_000001.json", "ema_0.5_000001.dcp", "ema_0.9_000001.dcp", "model000001.dcp", "opt000001.dcp",
        "trainer000001.pt"]
    before, after = (digest(tmp_path / place, 1) for place in ("run", "back"))
    assert before.pop("opt000001.pt") and after.pop("opt000001.pt") and before == after
    one, other = (manifest.newest(str(tmp_path / place)) for place in ("run", "back"))
    assert (one.config, one.initial_weight, one.seconds) == (other.config, other.initial_weight, other.seconds)


def test_nothing_is_overwritten(images, tmp_path):
    run(images, tmp_path, 1)
    with pytest.raises(UserError, match="already holds a checkpoint of step 1: choose another folder"):
        convert_run(str(tmp_path), str(tmp_path), "dcp")
