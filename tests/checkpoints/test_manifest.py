"""Checkpoints appear whole or not at all, are found again, and say what does not fit."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th

from cm.checkpoints import loading, manifest, serialization
from cm.checkpoints.formats import openai
from cm.errors import UserError
from cm.io import storage
from cm.networks.build import create_model
from support.damage import flip_a_bit, truncate
from support.nets import plain_state_dict

CONTENT = {"model": {"w": th.arange(6.0)}, "ema_0.9999": {"w": th.ones(6)}, "opt": {"state": {}}}


def save(directory, step):
    return manifest.save(str(directory), step, CONTENT, {"image_size": 8}, step * 4)


def test_names_are_those_of_guided_diffusion():
    assert manifest.file_name("model", 10) == "model000010.pt"
    assert manifest.file_name("ema_0.9999", 10) == "ema_0.9999_000010.pt"
    assert manifest.file_name("target_model", 1_234_567) == "target_model1234567.pt"
    for name in ("model", "opt", "trainer", "target_model", "teacher_model", "ema_0.9999", "ema_0.9999432189950708"):
        assert manifest.parse_name("/runs/model5.1/" + manifest.file_name(name, 100)) == (name, 100)
    assert manifest.parse_name("cd_imagenet64_l2.pt") is None


def test_a_saved_checkpoint_is_found_with_everything_it_holds(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    found = manifest.newest(str(tmp_path))
    assert (found.step, found.images_seen, found.config) == (20, 80, {"image_size": 8})
    assert sorted(found.names()) == ["ema_0.9999", "model", "opt"]
    assert th.equal(th.load(found.path("model"), weights_only=True)["w"], CONTENT["model"]["w"])
    assert found.path("target_model") is None
    assert manifest.beside(str(tmp_path / "ema_0.9999_000010.pt")).step == 10
    assert manifest.beside(str(tmp_path / "ema_0.9999_000011.pt")) is None






DAMAGES = {
    "file missing": lambda folder: (folder / "opt000020.pt").unlink(),
    "file truncated": lambda folder: truncate(folder / "model000020.pt"),
    "bit flipped": lambda folder: flip_a_bit(folder / "ema_0.9999_000020.pt"),
    "manifest missing": lambda folder: (folder / "checkpoint_000020.json").unlink(),
    "manifest truncated": lambda folder: truncate(folder / "checkpoint_000020.json"),
    "manifest of another kind": lambda folder: (folder / "checkpoint_000020.json").write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    save(tmp_path, 10)
    save(tmp_path, 20)
    damage(tmp_path)
    assert manifest.newest(str(tmp_path)).step == 10


@pytest.mark.parametrize("value", [np.float64(1), Path("ref.npz"), type("Word", (str,), {})("0.9")])
def test_what_no_reader_would_take_back_is_not_written(tmp_path, value):
    """A checkpoint is read as data only: an object in it would be found out when the run is to go on."""
    with pytest.raises(TypeError, match="tensors and plain values, not (float64|PosixPath|Word)"):
        manifest.save(str(tmp_path), 1, {"trainer": {"watchers": {"settings": [value]}}}, {}, 1)
    assert manifest.newest(str(tmp_path)) is None


def test_nothing_to_find(tmp_path):
    assert manifest.newest(str(tmp_path)) is None
    assert manifest.newest(str(tmp_path / "absent")) is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    serialization.save_tensors(str(path), {"a": th.ones(2)})

    def breaks(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*x.pt.*No space left.*MiB are free"):
        storage.write_atomically(str(path), breaks)
    assert th.load(path, weights_only=True)["a"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_killed_while_saving_never_leaves_a_broken_newest(tmp_path):
    program = tmp_path / "saver.py"
    program.write_text(textwrap.dedent(f"""
        import itertools, torch as th
        from cm.checkpoints import manifest
        for step in itertools.count(1):
            manifest.save({str(tmp_path)!r}, step, {{"model": {{"w": th.full((300_000,), float(step))}}}}, {{}}, step)
            print(step, flush=True)
    """))
    for kill in range(3):
        saver = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
        saver.stdout.readline()
        time.sleep(0.013 * (kill + 1))
        os.kill(saver.pid, signal.SIGKILL)
        saver.wait()
        found = manifest.newest(str(tmp_path))
        assert (th.load(found.path("model"), weights_only=True)["w"] == found.step).all()
    (tmp_path / "model000001.pt.partial").write_bytes(b"left behind")
    manifest.remove_partial(str(tmp_path))
    assert not list(tmp_path.glob("*.partial"))


SMALL = dict(image_size=32, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="16",
             num_head_channels=16)


def test_weights_that_do_not_fit_are_named():
    model = create_model(**SMALL)
    good = plain_state_dict(model)
    loading.fit(model, good, "a.pt")
    odd = dict(good)
    odd["out.2.bias"] = th.zeros(6)
    odd["stranger"] = odd.pop("time_embed.0.bias")
    with pytest.raises(UserError) as error:
        loading.fit(model, odd, "b.pt")
    for words in ("b.pt", "1 missing: time_embed.0.bias", "1 unknown: stranger", "out.2.bias [6] in the file, [3]"):
        assert words in str(error.value)


@pytest.mark.parametrize("options", [
    {},
    {"class_cond": True, "num_classes": 10, "use_scale_shift_norm": True},
    {"resblock_updown": True, "num_res_blocks": 2, "attention_resolutions": "32,16"},
    {"channel_mult": "1", "attention_resolutions": "32"},
    {"channel_mult": "1,2,2", "attention_resolutions": "16,8", "resblock_updown": True, "num_res_blocks": 3},
])
def test_architecture_is_read_off_the_weights(options):
    asked = {**SMALL, **options}
    with th.device("meta"):
        flags = openai.model_flags(create_model(**asked).state_dict(), "x.pt", image_size=32)
        again = create_model(**{**SMALL, **flags})
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in create_model(**asked).state_dict().items()
        }
    for name in ("num_channels", "num_res_blocks", "channel_mult", "attention_resolutions"):
        assert flags[name] == asked[name], name
    assert flags.get("resblock_updown", False) == (asked.get("resblock_updown", False) and asked["channel_mult"] != "1")


def test_published_imagenet64_is_recognised(request):
    keys = json.loads((request.path.parents[1] / "data" / "unet_keys_imagenet64.json").read_text())
    flags = openai.model_flags({name: th.empty(shape, device="meta") for name, shape in keys}, "cd_imagenet64_l2.pt")
    assert flags == {
        "num_channels": 192, "channel_mult": "1,2,3,4", "num_res_blocks": 3, "use_scale_shift_norm": True,
        "resblock_updown": True, "class_cond": True, "num_classes": 1000, "image_size": 64, "num_head_channels": 64,
        "attention_resolutions": "32,16,8",
    }


def test_foreign_weights_are_refused():
    with pytest.raises(UserError, match="no U-Net of this toolkit.*time_embed.0.weight.*conv_in.weight"):
        openai.architecture({"conv_in.weight": th.zeros(1)}, "x.pt")
