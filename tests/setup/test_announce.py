"""What a training run says of itself."""

import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cm.data.sources import open_source
from cm.setup.announce import best_weights, data_line
from cm.training.callbacks import Evaluation
from support.commands import edm
from support.mpi import ROOT, clean_environment


@pytest.mark.parametrize(("labels", "classes", "expected"), [
    (None, True, "6 images of images, without classes (dataset.json has no labels)"),
    ([0, 1, 1, 2, 2, 2], True, "6 images of images, classes from dataset.json: cat 1, dog 2, emu 3"),
    ([0, 0, 0, 0, 0, 0], True, "6 images of images, classes from dataset.json: cat 6, dog 0, emu 0"),
    ([0, 1, 1, 2, 2, 2], False, "6 images of images, without classes (class_cond=False)"),
])
def test_the_data_in_one_line(tmp_path, monkeypatch, labels, classes, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / f"x_{i}.png")
    pairs = labels and [[f"x_{i}.png", label] for i, label in enumerate(labels)]
    text = json.dumps({"labels": pairs, "class_names": ["cat", "dog", "emu"]})
    (tmp_path / "images" / "dataset.json").write_text(text)
    assert data_line(open_source("images", 8), classes) == expected


def test_many_classes_are_shortened():
    line = data_line(open_source("digits", 8), True)
    assert line == ("1797 images of digits, classes from scikit-learn: 0 178, 1 182, 2 177, 3 183, 4 181, and 5 more")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, its name with a space, and what its log says."""
    folder = tmp_path_factory.mktemp("announced") / "a run"
    done = edm(folder, 5, "--eval_steps", 2, ranks=1)
    return folder, (folder / "log.txt").read_text(), done


def test_start_saves_and_end_are_a_line_each(run):
    folder, text, done = run
    starts = re.findall(r"^training starts.*", text, re.MULTILINE)
    assert len(starts) == 1
    for part in ("to step 5: 1797 images of digits, classes from scikit-learn: 0 178", r"[\d,]{6,} parameters; 1 rank ",
                 "with 1 thread on cpu, fp32; memory of a rank: [\\d.]+ MiB, and about [\\d.]+ MiB for 16 images"):
        assert re.search(part, starts[0]), (part, starts)
    saves = re.findall(r"^saved step (\d+) in (.*): (.*) \(([\d.]+) MiB\)$", text, re.MULTILINE)
    assert [save[:3] for save in saves] == [
        (str(step), str(folder), "model, ema_0.9999, opt, trainer") for step in (4, 5)
    ]
    size = sum(path.stat().st_size for path in folder.glob("*000005.pt"))
    assert float(saves[1][3]) == pytest.approx(size / 2**20, abs=0.06)
    assert "\r" not in done.stderr and re.search("^training: 100%, 5 of 5 in", done.stderr, re.MULTILINE)


def test_the_command_of_the_last_line_works_when_it_is_pasted(run):
    folder, text, _ = run
    last = text.rstrip().splitlines()[-1]
    newest = folder / "ema_0.9999_000005.pt"
    assert last.startswith(f"training is finished at step 5; nothing was evaluated, the newest is {newest}.")
    command = last.partition("To sample it: ")[2]
    assert shlex.split(command)[0] == sys.executable
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.load(folder / "samples_drawn" / "samples_64x8x8x3.npz")["class_names"].tolist() == list("0123456789")


@pytest.mark.parametrize("kind, suffix", [("files", "pt"), ("dcp", "dcp")])
def test_the_newest_is_named_by_its_format(kind, suffix):
    loop = SimpleNamespace(callbacks=[], ema_rate=["0.9"], step=7, checkpoints=SimpleNamespace(directory="run"),
                           config=SimpleNamespace(checkpoint_format=kind))
    assert best_weights(loop) == ("nothing was evaluated, the newest is ", f"run/ema_0.9_000007.{suffix}")


def test_the_best_is_named_where_samples_were_measured(monkeypatch):
    monkeypatch.setattr("cm.training.callbacks.logger.get_dir", lambda: "run")
    sampler, metric = SimpleNamespace(rate="0.9999"), SimpleNamespace(label="FID")
    measured = Evaluation(sampler, 2, 10, metric, {}, {"step": 4, "value": 3.25})
    loop = SimpleNamespace(callbacks=[SimpleNamespace(), measured])
    assert best_weights(loop) == ("the best, FID 3.25 of step 4, is ", "run/best/ema_0.9999_000004.pt")
