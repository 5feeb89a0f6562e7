"""Classes keep their meaning from the data through training, resuming, distilling, sampling and editing."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from cm.checkpoints import manifest
from cm.data.sources import open_source
from cm.errors import UserError
from cm.logging import logger
from support.as_module import as_module
from support.command_line import overridden
from support.commands import NETWORK, QUIET, edm
from support.mpi import ROOT

NAMES = ["ant", "cat"]
RUN = ("--global_batch_size", 4, "--eval_steps", 2)


def pictures(folder, names):
    """Three images of each class, in folders; a class has the same ones everywhere."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            pixels = np.random.default_rng([*name.encode(), i]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run on ants and cats; and a folder where ants have left and dogs have come."""
    home = tmp_path_factory.mktemp("classes")
    pictures(home / "data", NAMES)
    pictures(home / "shifted", ["cat", "dog"])
    edm(home / "run", 2, "--data_dir", home / "data", *RUN, ranks=1)
    return home


def same_process(monkeypatch, script, *words):
    """Run a script in this process; mistakes are raised."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [script, *overridden(words)])
    module = as_module(ROOT / "scripts" / script)
    try:
        module.main(module.read_flags())
    finally:
        logger.reset()


def sample(monkeypatch, home, folder, *words):
    same_process(monkeypatch, "image_sample.py", "--model_path", home / "run", "--steps", 2, "--num_samples", 8,
                 "--log_dir", folder, *words)
    return dict(np.load(folder / "samples_8x8x8x3.npz"))


def test_the_names_are_in_the_checkpoint(home):
    assert list(manifest.newest(str(home / "run")).class_names) == NAMES


@pytest.mark.mpi
def test_a_resume_on_other_classes_is_refused_on_every_rank(home):
    before = {path: path.read_bytes() for path in (home / "run").iterdir() if path.suffix in (".pt", ".json")}
    refused = edm(home / "run", 3, "--data_dir", home / "shifted", *RUN, ranks=2, expect=2)
    for part in ("The checkpoint: ant, cat; the data: cat, dog", "Class 0 was 'ant' and is now 'cat'",
                 "--allow_other_classes True"):
        assert part in refused.stderr, refused
    assert refused.stderr.count("error:") == 1 and "Traceback" not in refused.stderr
    assert {path: path.read_bytes() for path in before} == before


STARTS = {
    "--resume": ("edm_train.py", "--resume", "checkpoint_000002.json"),
    "--resume_checkpoint": ("edm_train.py", "--resume_checkpoint", "ema_0.9999_000002.pt"),
    "--teacher_model_path": ("cm_train.py", "--teacher_model_path", "ema_0.9999_000002.pt"),
}


@pytest.mark.parametrize("flag", STARTS)
def test_a_start_from_a_checkpoint_of_other_classes_is_refused(monkeypatch, home, tmp_path, flag):
    script, _, file = STARTS[flag]
    pictures(tmp_path / "more", ["ant", "bee", "cat"])      # one more in between: the network would not even fit
    monkeypatch.setattr("cm.distributed.signals.allow", lambda seconds: None)
    for folder, found in ((home / "shifted", "cat, dog"), (tmp_path / "more", "ant, bee, cat")):
        monkeypatch.setattr(sys, "argv", [script, *overridden([
            *NETWORK, "--data_dir", folder, *RUN, "--total_training_steps", 1, "--log_dir", tmp_path / "new",
            flag, home / "run" / file, *(["--loss_norm", "l2"] if script == "cm_train.py" else []),
        ])])
        module = as_module(ROOT / "scripts" / script)
        with pytest.raises(UserError) as error:
            module.main(module.read_flags())
        logger.reset()
        assert f"{flag} {home / 'run' / file}. The checkpoint: ant, cat; the data: {found}. Class" in str(error.value)
        assert not (tmp_path / "new" / "config.json").exists()


def test_sampling_takes_names_and_records_them(monkeypatch, home, tmp_path):
    both = sample(monkeypatch, home, tmp_path / "both", "--class_label", "cat,ant")
    assert both["class_names"].tolist() == NAMES and set(both["arr_1"].tolist()) == {0, 1}
    by_name = sample(monkeypatch, home, tmp_path / "name", "--class_label", "cat")
    by_number = sample(monkeypatch, home, tmp_path / "number", "--class_label", "1")
    assert by_name["arr_1"].tolist() == [1] * 8
    np.testing.assert_array_equal(by_name["arr_0"], by_number["arr_0"])
    source = open_source(str(tmp_path / "both" / "samples_8x8x8x3.npz"), 8)
    assert source.class_names == tuple(NAMES), "samples are a data set with the same classes"
    with pytest.raises(UserError, match="--class_label dog is none of the model's classes 0 to 1: ant, cat"):
        sample(monkeypatch, home, tmp_path / "none", "--class_label", "dog")
    with pytest.raises(UserError, match="--class_label -5: -5 is too small"):
        sample(monkeypatch, home, tmp_path / "none", "--class_label", -5)


def test_a_folder_of_samples_is_a_data_set_of_the_same_classes(monkeypatch, home, tmp_path):
    out = tmp_path / "out"
    for seeds in ("0-4", "3-7,2000"):                       # the second run adds to what the first has left
        same_process(monkeypatch, "image_sample.py", "--model_path", home / "run", "--steps", 2, "--log_dir",
                     tmp_path / "log", "--outdir", out, "--subdirs", "True", "--seeds", seeds)
    together = sample(monkeypatch, home, tmp_path / "npz")
    source = open_source(str(out), 8)
    assert source.class_names == tuple(NAMES) and len(source) == 9
    labels = {source.name(i): source.label(i) for i in range(9)}
    assert [labels[f"000000/{seed:06d}.png"] for seed in range(8)] == together["arr_1"].tolist()
    assert json.loads((out / "sampling.json").read_text())["class_label"] == -1, "as in folders of earlier versions"


def test_edited_images_keep_their_class_by_name(monkeypatch, home, tmp_path):
    def edit(images, count, *words):
        same_process(monkeypatch, "image_edit.py", "--model_path", home / "run", "--task", "denoise", "--images",
                     images, "--sampler", "euler", "--steps", 2, "--ts", "", "--log_dir", tmp_path / "log", *words)
        return np.load(next((tmp_path / "log").glob(f"samples_{count}x*.npz")))["arr_1"].tolist()

    cats = tmp_path / "cats"
    cats.mkdir()
    shutil.copy(home / "data" / "cat" / "0.png", cats / "cat_0.png")
    assert edit(cats, 1) == [1], "class 0 of these images, and class 1 of the network"
    with pytest.raises(UserError, match="has images of dog, but the network has the classes ant, cat; choose one"):
        edit(home / "shifted", 6)
    assert edit(home / "shifted", 6, "--class_label", "ant") == [0] * 6


def test_conversion_keeps_the_names(monkeypatch, home, tmp_path):
    same_process(monkeypatch, "convert_checkpoint.py", "--source", home / "run" / "ema_0.9999_000002.pt", "--dest",
                 tmp_path / "native")
    assert list(manifest.newest(str(tmp_path / "native")).class_names) == NAMES
