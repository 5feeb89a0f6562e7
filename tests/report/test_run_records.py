"""What is read back from a run's folder, and what is said of what cannot be read."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from cm.errors import UserError
from cm.logging import logger
from cm.report.run_records import read_run


@pytest.fixture
def run(tmp_path):
    """A folder as training leaves it, written by the logger itself."""
    with logger.scoped_configure(tmp_path, ["csv", "json"]):
        for step in (10, 20, 30):
            logger.logkvs({"step": step, "samples": 8 * step, "loss": 1 / step, "loss_q0": math.nan})
            logger.dumpkvs()
    (tmp_path / "config.json").write_text(json.dumps({"lr": 1e-3, "image_size": 8}))
    (tmp_path / "checkpoint_000030.json").write_text("{}")
    (tmp_path / "samples").mkdir()
    for step in (100, 30):
        Image.fromarray(np.full((4, 6, 3), step, np.uint8)).save(tmp_path / "samples" / f"samples_{step:06d}.png")
    return tmp_path


def test_everything_that_training_left(run):
    (run / "best.json").write_text(json.dumps({"step": 30, "metric": "FID", "value": 2.0, "file": "best/ema.pt"}))
    (run / "metrics.json").write_text(json.dumps({"metrics": {}}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    record = read_run(str(run))
    assert record.curves["loss"] == [(10, 0.1), (20, 0.05), (30, 1 / 30)]
    assert "loss_q0" not in record.curves, "nan is no point"
    assert record.last("samples") == (30, 240) and record.last("fid") is None
    assert record.config["lr"] == 1e-3 and record.best["value"] == 2.0
    assert [(grid.step, grid.width, grid.height) for grid in record.grids] == [(30, 6, 4), (100, 6, 4)]
    assert list(record.summaries) == ["metrics.json"]
    assert record.problems == []
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, "files are only read"


def test_json_stands_in_for_csv(run):
    csv = read_run(str(run)).curves
    (run / "progress.csv").unlink()
    assert read_run(str(run)).curves == csv


@pytest.mark.parametrize("name, content, message", [
    ("progress.csv", b"", "progress.csv has no row yet"),
    ("progress.csv", b"step,loss\n", "progress.csv has no row yet"),
    ("other.txt", b"1", "has no log .progress.csv or progress.json.*OPENAI_LOG_FORMAT"),
])
def test_a_folder_without_a_log_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_run(str(tmp_path))


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder; give the --log_dir"):
        read_run(str(tmp_path / "nowhere"))


def damage(name, content):
    def do(run):
        (run / name).write_bytes(content)
    return do


HEAD = b"step,loss\n1,5\n2,4\n"

DAMAGES = {
    "torn last row": (damage("progress.csv", HEAD + b"3"), "progress.csv: line 4 incomplete or damaged", "loss", 2),
    "row with more cells": (damage("progress.csv", HEAD + b"3,3,3\n4,2\n"), "line 4 incomplete or damaged", "loss", 3),
    "a word": (damage("progress.csv", HEAD + b"3,many\n"), "column 'loss': 1 cell(s) are no number", "loss", 2),
    "a step that is none": (damage("progress.csv", HEAD + b"x,3\n"), "column 'step': 1 cell(s)", "loss", 2),
    "bytes": (damage("progress.csv", HEAD + b"\xff\x00\xfe,\x00\n"), "column 'step': 1 cell(s)", "loss", 2),
    "huge cell": (damage("progress.csv", HEAD + b"9" * 200_000 + b",1\n"), "line 4 incomplete or damaged", "loss", 2),
    "no step": (damage("progress.csv", b"loss\n5\n4\n"), "no column 'step': rows are numbered", "loss", 2),
    "loss that is not finite": (damage("progress.csv", HEAD + b"3,nan\n4,inf\n"), "loss is not finite at steps 3, 4",
                                "loss", 2),
    "step twice": (damage("progress.csv", HEAD + b"2,3\n"), None, "loss", 2),
    "flags that are no JSON": (damage("config.json", b"{"), "config.json cannot be read", "loss", 3),
    "flags that are no object": (damage("config.json", b"[1]"), "config.json holds a list", "loss", 3),
    "best that is no JSON": (damage("best.json", b"\xff"), "best.json cannot be read", "loss", 3),
    "classes that are no JSON": (damage("classes.json", b"{"), "classes.json cannot be read", "loss", 3),
    "classes that are no object": (damage("classes.json", b'{"classes": 3}'), "no numbers of images", "loss", 3),
    "classes without numbers": (damage("classes.json", b'{"classes": {"a": "b"}}'), "no numbers of images", "loss", 3),
    "no picture": (damage("samples/samples_000001.png", b"GIF89a"), "000001.png is not a complete PNG", "loss", 3),
    "picture without a step": (damage("samples/grid.png", b""), "samples/grid.png names no step", "loss", 3),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_read_is_named_and_the_rest_is_there(run, name):
    do, gap, column, count = DAMAGES[name]
    do(run)
    record = read_run(str(run))
    assert len(record.curves[column]) == count
    if gap is None:
        assert record.problems == [] and record.curves[column][-1] == (2, 3), "the last row of a step counts"
    else:
        assert len(record.problems) == 1 and gap in record.problems[0], record.problems


def test_a_cut_off_picture_is_left_out(run):
    path = run / "samples" / "samples_000030.png"
    path.write_bytes(path.read_bytes()[:50])
    record = read_run(str(run))
    assert [grid.step for grid in record.grids] == [100] and "samples_000030.png" in record.problems[0]


def test_a_log_alone_says_what_is_missing(run):
    (run / "config.json").unlink()
    for path in (run / "samples").iterdir():
        path.unlink()
    problems = read_run(str(run)).problems
    assert ["no config.json" in problems[0], "--sample_interval -1" in problems[1], len(problems)] == [True, True, 2]


def test_values_that_no_axis_holds_are_named_and_left_out(tmp_path):
    (tmp_path / "progress.csv").write_text("step,fid\n1,1e308\n2,-1e101\n3,5e-324\n1e16,2\n4,7\n")
    run = read_run(str(tmp_path))
    assert run.curves["fid"] == [(3, 0.0), (4, 7.0)]
    assert any("column 'fid': 2 cell(s) beyond 1e+100" in problem for problem in run.problems)
    assert any("column 'step': 1 cell(s) are no number" in problem for problem in run.problems)
