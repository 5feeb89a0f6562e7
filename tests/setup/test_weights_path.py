"""The folder of a run stands for its best or newest weights, wherever weights are read."""

import json

import pytest

from cm.checkpoints import manifest
from cm.config.flags import parse
from cm.config.sampling_schema import ConvertConfig, EditConfig, GuidanceConfig, SampleConfig, SolverConfig
from cm.config.schema import TRAINING_SECTIONS, DiffusionConfig, ModelConfig, RunConfig
from cm.errors import UserError
from cm.setup.guide import DISTILLING, SAMPLING, choose_guide
from cm.setup.inherit import inherit_checkpoint, inherit_resumed
from cm.setup.rules import inherit_teacher
from cm.setup.sample import inherit_model
from cm.setup.weights_path import weights_in
from support.damage import flip_a_bit, truncate
from support.nets import plain_state_dict
from support.weights import TINY, tiny

CONFIG = {**TINY, "training_mode": "edm"}
NETWORK = (ModelConfig, DiffusionConfig)
DRAWING = (SampleConfig, SolverConfig, GuidanceConfig, RunConfig)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints, of whose newest the weights of the average are the default."""
    folder = tmp_path_factory.mktemp("runs") / "edm"
    weights = plain_state_dict(tiny())
    for step in (10, 20):
        manifest.save(str(folder), step, {"model": weights, "ema_0.9": weights}, CONFIG, 40,
                      initial_weight={"ema_0.9": 0.0})
    return folder


def newest(folder, step=20):
    return f"{folder}/ema_0.9_{step:06d}.pt"


def copied(run, tmp_path):
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def settings_of(*words, sections):
    return parse("", *sections, argv=[str(word) for word in words])


def choose(flags):
    def read(settings):
        settings.replace(image_size=8, class_cond=True, num_classes=5)
        choose_guide(settings, flags)
    return read


@pytest.mark.parametrize("flag, sections, read", [
    ("model_path", DRAWING, inherit_model),                         # sampling and search
    ("model_path", (EditConfig, *DRAWING[1:]), inherit_model),
    ("source", (ConvertConfig,), lambda settings: inherit_checkpoint(settings, "source", also=("training_mode",))),
    ("teacher_model_path", TRAINING_SECTIONS, inherit_teacher),
    ("resume_checkpoint", TRAINING_SECTIONS, inherit_resumed),
    ("guide_path", DRAWING, choose(SAMPLING)),
    ("teacher_guide_path", TRAINING_SECTIONS, choose(DISTILLING)),
])
def test_every_flag_takes_a_run_and_says_what_it_took(run, capsys, flag, sections, read):
    scale = {"guide_path": ["--guide_scale", 2], "teacher_guide_path": ["--teacher_guide_scale", 2]}.get(flag, [])
    settings = settings_of(f"--{flag}", run, *scale, sections=dict.fromkeys((*sections, *NETWORK)))
    read(settings)
    assert settings.values[flag] == newest(run)
    told = capsys.readouterr()
    assert f"--{flag} {run}: using {newest(run)}" in told.out + told.err


def test_a_damaged_newest_is_passed_over(run, tmp_path, capsys):
    folder = copied(run, tmp_path)
    flip_a_bit(folder / "ema_0.9_000020.pt")
    assert weights_in(str(folder), "model_path") == newest(folder, 10)
    assert "is damaged (its checksum differs" in "".join(capsys.readouterr())
    assert weights_in(str(folder), "model_path", verify=False) == newest(folder)
    truncate(folder / "model000020.pt")                             # not the file that is taken: not complete
    assert weights_in(str(folder), "model_path", verify=False) == newest(folder, 10)


def test_a_milestone_will_do(run, tmp_path):
    folder = copied(run, tmp_path)
    for name in ("checkpoint_000020.json", "ema_0.9_000020.pt", "model000010.pt"):
        (folder / name).unlink()
    first = manifest.read(str(folder / "checkpoint_000010.json"))
    first.files.pop("model000010.pt")
    first.write_manifest()
    assert weights_in(str(folder), "model_path") == newest(folder, 10)


def test_checkpoints_in_another_folder(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint_dir": str(run)}))
    assert weights_in(str(tmp_path), "model_path") == newest(run)
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint_dir": "gs://bucket/run"}))
    with pytest.raises(UserError, match="the run wrote its checkpoints to gs://bucket/run"):
        weights_in(str(tmp_path), "model_path")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="without a complete checkpoint"):
        weights_in(str(tmp_path), "model_path")
