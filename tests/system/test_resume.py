"""Resuming: bit for bit on the same ranks, in every mode; the same curve on any others; and nothing saved in vain."""

import csv
import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch as th

from cm.checkpoints import file_names, manager, manifest
from cm.data.loader import load_data
from cm.errors import UserError
from cm.setup.data import share_of_batch
from cm.training import state
from cm.training.state import load_part
from support.mpi import ROOT
from support.training import digest, loop, run
from support.warm import mpiexec
from system.resume_cases import CASES, prepare

LONG = 10                                                   # steps of the run that changes its number of ranks


def on_ranks(n, folder, **tasks):
    program = ROOT / "tests/system/resume_cases.py"
    done = mpiexec(n, [str(program), str(folder), json.dumps(tasks)], timeout=280)
    assert done.rc == 0, done
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Everything that two ranks are asked for, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    report = on_ranks(
        2, folder, bitwise=list(CASES), go_on=[["straight", LONG], ["stopped", 4]],
        spoilt={"fp32": {}, "fp16": {"use_fp16": True}, "bf16": {"precision": "bf16"}},
    )
    return folder, report


@pytest.mark.mpi
def test_two_ranks_resume_bit_for_bit(two_ranks):
    _, report = two_ranks
    found = {name: report[name] for name in CASES}
    assert all(all(files.values()) for files in found.values()), found
    kinds = {file_names.parse_name(file)[0] for files in found.values() for file in files}
    assert kinds == {"model", "opt", "trainer", "ema_0.5", "ema_0.9", "target_model", "teacher_model"}


def curve(directory):
    with open(directory / "progress.csv") as file:
        return [(int(row["step"]), int(row["samples"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_other_ranks_go_on_with_the_same_curve(two_ranks, tmp_path, ranks):
    """A batch of 8 on 3 ranks too: shares of 3, 3 and 2. Three and four ranks also resume bit for bit."""
    folder, _ = two_ranks
    shutil.copytree(folder / "stopped", tmp_path / "stopped")
    if ranks == 1:
        prepare(str(folder / "images.npz"), tmp_path / "stopped", LONG, "edm").run_loop()
    else:
        cases = ["edm dropout microbatches workers", "consistency_distillation fp16 workers"]
        report = on_ranks(ranks, tmp_path, bitwise=cases, go_on=[["stopped", LONG]])
        assert all(all(files.values()) for files in report.values()), report
    expected, found = np.array(curve(folder / "straight")), np.array(curve(tmp_path / "stopped"))
    assert np.array_equal(found[:, :2], expected[:, :2]) and found[-1, 1] == 8 * LONG
    # The same samples and noise; gradients of float32 are added in another order, for six steps.
    np.testing.assert_allclose(found[:, 2], expected[:, 2], rtol=2e-5)


@pytest.mark.mpi
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_batch_that_is_not_finite_on_one_rank_stops_all_alike(two_ranks, precision):
    folder, report = two_ranks
    one, other = report[precision]
    assert one["said"] == other["said"] and one["weights"] == other["weights"]
    assert one["stepped"] == other["stepped"] == 0 and one["scale"] == other["scale"]
    # fp16 first tries every loss scale from 2^20 down to 2^-15.
    assert one["step"] == other["step"] == (36 if precision == "fp16" else 0)
    assert f"step {one['step']}: the loss is not finite for 1 of its 8 samples" in one["said"]
    assert f"image {other['image']} at sigma " in one["said"] and "rank 1)" in one["said"]
    assert "The weights are untouched" in one["said"]


# --- every item that is saved is needed -------------------------------------------------------------------------------


ITEMS = {
    "model": ("edm", {}), "opt": ("edm", {}), "ema_0.5": ("edm", {}), "ema_0.9": ("edm", {}),
    "images_seen": ("edm", {}), "memory": ("edm", {"memory": True}), "lg_loss_scale": ("edm", {"use_fp16": True}),
    "target_model": ("consistency_training", {}), "teacher_model": ("progdist", CASES["progdist"]),
}


@pytest.mark.parametrize("item", ITEMS)
def test_a_run_that_forgets_something_is_another_run(images, tmp_path, monkeypatch, item):
    mode, options = ITEMS[item]
    prepare(images, tmp_path / "start", 1, mode, **options).save()             # what a run holds before its first step
    start = manifest.newest(str(tmp_path / "start"))
    stop, steps = 5, 7                                      # progdist has had its second stage by then
    for directory in ("kept", "forgotten"):
        prepare(images, tmp_path / directory, stop, mode, **options).run_loop()

    def forgetful(name, checkpoint, *verify):
        content = load_part(name, checkpoint, *verify)
        fresh = load_part(name, start, *verify)
        if name == item:
            return fresh
        return content | {item: fresh[item]} if name == "trainer" and item in fresh else content

    prepare(images, tmp_path / "kept", steps, mode, **options).run_loop()
    monkeypatch.setattr(state, "load_part", forgetful)
    if item == "images_seen":
        kind = manager.CheckpointManager
        find = kind.find
        monkeypatch.setattr(kind, "find", lambda *args: dataclasses.replace(find(*args), images_seen=0))
    prepare(images, tmp_path / "forgotten", steps, mode, **options).run_loop()
    assert digest(tmp_path / "kept", steps) != digest(tmp_path / "forgotten", steps)


# --- shares and flags -------------------------------------------------------------------------------------------------


def test_shares_of_a_batch():
    assert [share_of_batch(8, -1, rank, 3) for rank in range(3)] == [(3, 8), (3, 8), (2, 8)]
    assert share_of_batch(2048, 4, 1, 3) == (4, 12)
    with pytest.raises(UserError, match="--global_batch_size 3 leaves some of 4 ranks without"):
        share_of_batch(3, -1, 0, 4)


def test_a_larger_batch_goes_on_where_the_data_were(images, tmp_path):
    """Positions count images, not steps: no image is shown twice, and none left out, when the batch changes."""
    run(images, tmp_path, 2)
    fours = partial(load_data, data_dir=images, batch_size=4, image_size=8, class_cond=True, seed=3)
    training = loop(images, tmp_path, 4, batch_size=4, data=lambda start: fours(start=start))
    assert training.images_seen == 16
    training.run_loop()
    assert [row[1] for row in curve(tmp_path)] == [8, 16, 20, 24]
    assert th.equal(training.microbatches[-1][0].positions, th.arange(20, 24))
