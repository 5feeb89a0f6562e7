"""benchmarks/save_stall.py runs, and has a row for each way of saving."""

import runpy
import sys

from support.mpi import ROOT


def test_it_measures_every_way(tmp_path, capsys, monkeypatch):
    flags = ["--parameters", "1", "--repeats", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["save_stall.py", *flags])
    runpy.run_path(str(ROOT / "benchmarks/save_stall.py"))["main"]()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "M |" in line]
    assert [row[2].strip() for row in rows] == ["files", "dcp", "dcp, in the background"]
    assert all(0 < float(row[3]) <= float(row[4]) for row in rows) and not list(tmp_path.iterdir())
