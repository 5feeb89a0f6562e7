"""What a dry run says of a run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch as th
from PIL import Image

from cm.checkpoints import manifest
from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.io import storage
from cm.setup.dry_run import dry_run, free_memory, memory_warning
from cm.setup.model import model_from
from cm.setup.train import loop_config, train
from support.command_line import overridden
from support.commands import NETWORK
from support.damage import flip_a_bit
from support.mpi import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from memory_table import settings_of


def test_a_dry_run_says_what_a_rank_will_hold(capsys):
    settings = settings_of("configs/digits/cd.yaml", "--dry_run_ranks", "4", "--shard_ema", "True", "--microbatch", "3",
                           "--ema_rate", "0.9,0.99", "--precision", "fp16")
    config = loop_config(settings)
    assert (config.shard_ema, config.shard_optimizer, config.ema_device) == (True, False, "same"), "as the run itself"
    dry_run(settings)
    said = capsys.readouterr()
    memory, parameters = json.loads(said.out)["memory"], json.loads(said.out)["parameters"]
    assert memory["ranks"] == 4 and memory["images_per_pass"] == 3 and memory["activations_estimate"] > 0
    device = memory["device"]
    assert device["float32 masters"] == 4 * parameters and device["optimizer"] > 8 * parameters
    assert parameters < device["average 0.99"] < 1.2 * parameters, "four bytes each, of a quarter"
    assert device["target"] == device["parameters"] + device["float32 masters"]
    assert device["teacher"] == device["parameters"] < 4 * parameters, "nobody needs the masters of a teacher"
    assert memory["device_total"] == sum(device.values()) and memory["host"] == {}
    for name in (*device, "a checkpoint (disk)", "estimate: 3 images at a time"):
        assert name in said.err


def flags(tmp_path, *words):
    return parse("", *TRAINING_SECTIONS, argv=[str(word) for word in overridden([
        *NETWORK, "--data_dir", "digits", "--global_batch_size", 4, "--log_dir", tmp_path / "run", "--dry_run", *words,
    ])], training_mode="edm")


def teacher(folder, **changes):
    """A checkpoint of the network above."""
    settings = parse("", *TRAINING_SECTIONS, argv=NETWORK, training_mode="edm")
    settings.replace(num_classes=10)
    config = settings.values | {"training_mode": "edm"} | changes
    return manifest.save(str(folder), 5, {"model": model_from(settings).state_dict()}, config, 20,
                         classes=tuple("0123456789"))


def test_a_run_that_could_start_passes_and_writes_nothing(tmp_path, capsys):
    train(flags(tmp_path))
    said = capsys.readouterr()
    assert json.loads(said.out)["memory"]["device_total"] > 0 and "warning" not in said.err
    assert list(tmp_path.iterdir()) == []


def damage_data(folder):
    (folder / "data").mkdir()
    for i in range(5):
        (folder / "data" / f"a_{i}.png").write_bytes(b"no picture")


def damage_weights(folder):
    flip_a_bit(Path(teacher(folder / "other").path("model")))


def other_network(folder):
    saved = teacher(folder / "run")
    th.save({"w": th.zeros(3)}, saved.path("model"))
    facts = {"model000005.pt": storage.checksum(saved.path("model"))}
    replace(saved, files=facts).write_manifest()


PROBLEMS = {
    "no data": (None, ["--data_dir", "{}/nowhere"], "--data_dir .*/nowhere does not exist"),
    "no flag for data": (None, ["--data_dir", ""], "--data_dir is missing"),
    "data that is no picture": (damage_data, ["--data_dir", "{}/data", "--class_cond", "False"],
                                r"image 0 \(a_0.png\) cannot be read"),
    "no classes": (lambda folder: Image.new("RGB", (8, 8)).save(folder / "x.png"), ["--data_dir", "{}"],
                   "has no class labels: 'x.png' has no class"),
    "no file to start from": (None, ["--resume_checkpoint", "{}/x.pt"], "--resume_checkpoint .*/x.pt: no such file"),
    "damaged weights": (damage_weights, ["--resume_checkpoint", "{}/other/model000005.pt"], "is damaged"),
    "other classes": (lambda folder: teacher(folder / "run"), ["--data_dir", "{}/named"],
                      "The checkpoint: 0, 1, .*; the data: x, y"),
    "another network in the folder": (other_network, [], "model000005.pt does not fit this network"),
    "never resume": (lambda folder: teacher(folder / "run"), ["--resume", "never"], "already holds a checkpoint"),
    "a file as log_dir": (lambda folder: (folder / "run").touch(), [], "--log_dir .*/run is a file"),
    "a file as checkpoint_dir": (lambda folder: (folder / "c").touch(), ["--checkpoint_dir", "{}/c"],
                                 "--checkpoint_dir .*/c is a file"),
    "no reference": (None, ["--eval_interval", "5", "--eval_ref", "{}/ref.npz"], "ref.npz does not exist"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_run_that_could_not_start_is_refused_as_the_run_would_be(tmp_path, capsys, name):
    prepare, words, message = PROBLEMS[name]
    if "{}/named" in words:
        (tmp_path / "named").mkdir()
        for prefix in "xy":
            Image.new("RGB", (8, 8)).save(tmp_path / "named" / f"{prefix}_1.png")
    if prepare:
        prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    settings = flags(tmp_path, *[word.format(tmp_path) for word in words])
    with pytest.raises(UserError, match=message):
        train(settings)
    assert sorted(tmp_path.rglob("*")) == before
    assert json.loads(capsys.readouterr().out)["image_size"] == 8, "the resolved run is told all the same"


def test_what_does_not_fit_the_memory_names_the_microbatch(tmp_path, monkeypatch, capsys):
    gib = 2**30
    settings = flags(tmp_path)
    monkeypatch.setattr("cm.setup.dry_run.free_memory", lambda: 100 * gib)
    warning = memory_warning(settings, 4 * gib, 696 * gib, 2048)
    assert "needs 4.0 GiB and about 696.0 GiB for 2048 images at a time" in warning
    assert "--microbatch 282 or less" in warning, "(100 - 4) / 696 of 2048"
    assert "--microbatch 135 or less" in memory_warning(settings, 4 * gib, 696 * gib, 2048, here=2), "(50 - 4) / 696"
    assert memory_warning(settings, 4 * gib, 96 * gib, 2048) == ""
    assert "--microbatch 1 alone is not enough" in memory_warning(settings, 100 * gib, gib, 1)
    planned = flags(tmp_path, "--dry_run_ranks", 8)
    assert "the largest GPUs have 192.0 GiB" in memory_warning(planned, 4 * gib, 696 * gib, 2048)
    monkeypatch.setattr("cm.setup.dry_run.free_memory", lambda: 2**20)
    train(settings)
    assert "warning: a rank needs" in capsys.readouterr().err
    assert free_memory() > 2**20


def test_a_negative_microbatch_is_refused(tmp_path):
    with pytest.raises(UserError, match="microbatch=-2 is too small"):
        flags(tmp_path, "--microbatch", -2)
