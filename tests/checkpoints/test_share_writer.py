"""Checkpoints in shares: the run goes on while they are written; they exist when they are complete, or not at all."""

import os
import threading

import pytest
import torch as th

from cm.checkpoints import dcp, file_names, leftovers, manifest, share_writer
from cm.checkpoints.loading import WeightsFile, look_at
from cm.checkpoints.manager import CheckpointManager
from cm.checkpoints.share_writer import ShareWriter, prepare, write_shares
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.setup.announce import best_weights
from cm.setup.convert_run import convert_run
from cm.setup.weights_path import weights_in
from support.damage import flip_a_bit
from support.training import digest, loop, run


def names(folder):
    return sorted(os.listdir(folder))


def saves(folder, **options):
    """A manager that has saved step 1, and its writer."""
    manager = CheckpointManager(str(folder), **options)
    writer = ShareWriter(manager, in_background=True)
    save(writer, 1)
    writer.finish()
    return manager, writer


def save(writer, step, is_last=False, value=0.0):
    tensor = th.full((3, 2), value)
    parts = {"model": {"w": dcp.Piece(tensor, tensor.shape)}, "ema_0.9": {"w": dcp.Piece(tensor, tensor.shape)}}
    writer.save(writer.manager.checkpoint(step, step, {}), parts, {"trainer": {"step": step}}, is_last)
    return tensor


def held(monkeypatch):
    """Writers wait until it is set."""
    event, write = threading.Event(), share_writer.write_shares

    def slowly(*args):
        assert event.wait(60)
        return write(*args)

    monkeypatch.setattr(share_writer, "write_shares", slowly)
    return event


def test_it_writes_in_a_thread_of_the_device_of_its_rank(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(share_writer, "background_thread", lambda name, device: asked.append(device))
    ShareWriter(CheckpointManager(str(tmp_path)), in_background=True)
    assert asked == [dist.dev()]


def test_the_run_goes_on_and_may_change_what_is_saved(tmp_path, monkeypatch):
    _, writer = saves(tmp_path)
    event = held(monkeypatch)
    tensor = save(writer, 2, value=5.0)
    tensor.fill_(7.0)
    assert writer.is_writing() and file_names.steps(str(tmp_path)) == [1]
    event.set()
    writer.finish()
    assert not writer.is_writing() and file_names.steps(str(tmp_path)) == [1, 2]
    newest = manifest.newest(str(tmp_path))
    assert th.equal(dcp.open_part(newest.path("model"), newest.facts(newest.path("model")))["w"][...],
                    th.full((3, 2), 5.0))


def test_the_next_save_and_the_last_one_wait(tmp_path):
    _, writer = saves(tmp_path)
    save(writer, 2)
    save(writer, 3)
    assert file_names.steps(str(tmp_path)) == [1, 2]
    save(writer, 4, is_last=True)
    assert file_names.steps(str(tmp_path)) == [1, 2, 3, 4]


@pytest.mark.parametrize("when", ["prepared", "half of a share", "all shares", "described"])
def test_a_kill_at_any_moment_leaves_nothing_and_loses_nothing(tmp_path, when):
    """What lies there at that moment; the next start tidies up."""
    saves(tmp_path)
    before, folder = names(tmp_path), str(tmp_path / "model000002.dcp")
    prepare(str(tmp_path), 2, ["model"], 0)
    if when != "prepared":
        shares = write_shares(str(tmp_path), 2, {"model": {"w": dcp.Piece(th.ones(2), th.Size([2]))}}, 0)
    if when == "half of a share":
        os.rename(os.path.join(folder, "__0_0.distcp"), os.path.join(folder, ".__0_0.distcp.cm-0123456789ab.partial"))
    if when == "described":
        dcp.complete(folder, [shares["model"]])
    assert os.path.isdir(folder)
    leftovers.remove_partial(str(tmp_path))
    assert names(tmp_path) == before and manifest.newest(str(tmp_path)).step == 1


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch, on_save_error):
    _, writer = saves(tmp_path, on_save_error=on_save_error)
    before = names(tmp_path)

    def full(folder, rank, pieces):
        raise UserError(f"cannot write {folder}: No space left on device")

    monkeypatch.setattr(dcp, "write_share", full)
    try:
        save(writer, 2)
        writer.finish()
        assert on_save_error == "continue"
    except UserError as error:
        assert on_save_error == "stop" and "No space left on device" in str(error) and "needs 48 bytes" in str(error)
    assert names(tmp_path) == before


def test_old_ones_go_and_averages_of_milestones_stay(tmp_path):
    _, writer = saves(tmp_path, keep=1, milestone_interval=2)
    for step in (2, 3, 4, 5):
        save(writer, step)
    writer.finish()
    assert [name for name in names(tmp_path) if name.endswith(".dcp")] == [
        "ema_0.9_000002.dcp", "ema_0.9_000004.dcp", "ema_0.9_000005.dcp", "model000005.dcp"]
    assert file_names.steps(str(tmp_path)) == [2, 4, 5]


def test_a_run_in_shares_is_the_run_in_files(images, tmp_path):
    """Also where it is stopped, and goes on after a damaged save in the other format; converted, its files have the
    same bytes, but for the order in which an optimizer's lie."""
    shares = {"checkpoint_format": "dcp", "async_save": True}
    run(images, tmp_path / "files", 4, save_interval=2)
    run(images, tmp_path / "dcp", 4, save_interval=2, **shares)
    assert not list((tmp_path / "dcp").glob("model*.pt"))
    convert_run(str(tmp_path / "dcp"), str(tmp_path / "converted"), "files")
    converted, files = (digest(tmp_path / place, 4) for place in ("converted", "files"))
    assert converted.pop("opt000004.pt") and files.pop("opt000004.pt") and converted == files
    states = [th.load(tmp_path / place / "opt000004.pt", weights_only=True) for place in ("converted", "files")]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for ours, theirs in zip(*(state["state"].values() for state in states), strict=True):
        assert ours.keys() == theirs.keys() and all(th.equal(ours[name], theirs[name]) for name in ours)
    convert_run(str(tmp_path / "files" / "checkpoint_000002.json"), str(tmp_path / "back"), "dcp")
    for part in ("model000002.dcp", "opt000002.dcp"):
        ours, theirs = (dict(dcp.whole(dcp.open_part(str(tmp_path / place / part)))) for place in ("back", "dcp"))
        assert ours.keys() == theirs.keys() and all(th.equal(ours[key], theirs[key]) for key in ours)
    run(images, tmp_path / "back", 4)
    assert digest(tmp_path / "back", 4) == digest(tmp_path / "files", 4)
    flip_a_bit(next((tmp_path / "dcp" / "opt000004.dcp").glob("*.distcp")))
    training = loop(images, tmp_path / "dcp", 4)
    training.resume()
    assert training.step == 2


def test_weights_are_taken_from_shares(images, tmp_path):
    training = run(images, tmp_path, 1, checkpoint_format="dcp")
    assert weights_in(str(tmp_path), "model_path") == str(tmp_path / "model000001.dcp")     # of a run so short
    path = weights_in(str(tmp_path / "ema_0.5_000001.dcp") + "/", "model_path")
    kind, checkpoint = look_at(path)
    assert path.endswith("ema_0.5_000001.dcp") and kind and checkpoint.step == 1
    assert best_weights(training)[1] == path                # which the last line of a run names
    assert manifest.find(path).step == 1
    weights = WeightsFile(path, expected=checkpoint.facts(path)).take()
    whole = training.trainer.master_params_to_state_dict(training.averages.gather("0.5"))
    assert weights.keys() == whole.keys() and all(th.equal(weights[name], whole[name]) for name in whole)
    flip_a_bit(tmp_path / "ema_0.5_000001.dcp" / "__0_0.distcp")
    with pytest.raises(UserError, match="is damaged"):
        WeightsFile(path, expected=checkpoint.facts(path)).take()
