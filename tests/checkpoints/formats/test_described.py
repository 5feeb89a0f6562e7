"""safetensors files that describe their network: what is written is read, by others too, and claims are checked."""

import json
from pathlib import Path

import pytest
import torch as th
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cm.checkpoints.formats import described, safetensor_files
from cm.checkpoints.formats.described import KEY, Description
from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS, DiffusionConfig, ModelConfig
from cm.errors import UserError
from cm.report.run_facts import Measurement, RunFacts
from cm.setup import rules
from support.weights import TINY, adopt, tiny

CONFIG = {**vars(ModelConfig(**TINY)), **vars(DiffusionConfig()), "training_mode": "consistency_distillation"}
NAMES = ("cat", "dog", 'a "b"', "ü", "\n")
FACTS = RunFacts("pets.zip", 12, 300, 9600, 7.5, "cm-distill --lr 0.1", (Measurement("FID", 2.5, 50, "inception"),))


def written(tmp_path, **changes):
    path = str(tmp_path / "x.safetensors")
    described.write(path, tiny().state_dict(), Description(CONFIG | changes, NAMES, FACTS))
    return path


def rewritten(path, text):
    """The file with another description."""
    save_file(load_file(path), path, {"format": "pt", KEY: text if isinstance(text, str) else json.dumps(text)})
    return path


def test_a_file_needs_no_flag(tmp_path):
    settings, source = adopt(written(tmp_path))
    expected = tiny().state_dict()
    assert {name: settings.values[name] for name in TINY} == TINY
    assert settings.values["training_mode"] == source.training_mode == "consistency_distillation"
    assert source.class_names == NAMES
    assert all(th.equal(value, expected[name]) for name, value in source.take().items())
    with pytest.raises(UserError, match="asks for num_res_blocks=3, but the checkpoint .*x.safetensors was made with"):
        adopt(tmp_path / "x.safetensors", "--num_res_blocks", 3)


def test_a_teacher_needs_no_flag(tmp_path):
    teacher = written(tmp_path, training_mode="edm")
    words = ["--training_mode", "consistency_distillation", "--teacher_model_path", teacher]
    settings = parse("", *TRAINING_SECTIONS, argv=words)
    rules.inherit_teacher(settings)
    assert {name: settings.values[name] for name in TINY} == TINY
    settings = parse("", *TRAINING_SECTIONS, argv=[*words[:3], written(tmp_path)])
    with pytest.raises(UserError, match="is a consistency model; a teacher is a diffusion model"):
        rules.inherit_teacher(settings)


def test_other_programs_read_it(tmp_path):
    with safe_open(written(tmp_path), "pt") as file:
        said, names = json.loads(file.metadata()[KEY]), set(file.keys())
    assert said["config"] == CONFIG and names == set(tiny().state_dict())
    assert Description.from_json(said, "x").facts == FACTS


def test_a_changed_value_is_refused(tmp_path):
    path = written(tmp_path)
    data = bytearray(Path(path).read_bytes())
    data[-5] ^= 1
    Path(path).write_bytes(data)
    with pytest.raises(UserError, match="x.safetensors is damaged: its tensors have CRC-32"):
        adopt(path)
    adopt(path, "--verify_weights", False)


@pytest.mark.parametrize("text, message", [
    ("{", "cannot be read as a safetensors file"), ("[" * 200 + "]" * 200, "nested"), ([], "no flags"),
    ({"format": 1, "config": [1]}, "no flags"), ({"format": 2, "config": {}}, "format is 2, and this version reads 1"),
    ({"format": 1, "config": {}, "class_names": ["a", "a"]}, "a name twice"),
    ({"format": 1, "config": {}, "crc32": "1"}, "crc32 is no whole number"),
    ({"format": 1, "config": {}, "run": {"step": "many"}}, "step is a str"),
    ({"format": 1, "config": {}, "run": {"measured": [{"label": "FID", "value": float("nan")}]}},
     "value is not a number from 0"),
    ({"format": 1, "config": CONFIG | {"num_channels": "wide"}}, "num_channels='wide' is not a int"),
    ({"format": 1, "config": CONFIG | {"num_res_blocks": 10**8}}, "describes a network of at least"),
    ({"format": 1, "config": CONFIG | {"image_size": 10**9}}, "image_size=1000000000 is too large"),
    ({"format": 1, "config": CONFIG | {"arch": "huge"}}, "arch='huge' is not one of"),
])
def test_what_a_stranger_writes_is_checked(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        adopt(rewritten(written(tmp_path), text))


def test_files_of_others_are_not_claimed(tmp_path):
    save_file({"a": th.zeros(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "c.pt").write_bytes(Path(written(tmp_path)).read_bytes())
    assert not any(described.claims(str(tmp_path / name)) for name in ("a.safetensors", "b.safetensors", "c.pt", "d"))
    assert described.description(str(tmp_path / "a.safetensors")) is None
    with pytest.raises(UserError, match="not a complete safetensors file"):
        adopt(tmp_path / "b.safetensors")


def test_more_text_than_a_reader_takes_is_not_written(tmp_path):
    with pytest.raises(UserError, match="can hold at most 8,388,608 bytes of text"):
        safetensor_files.write(str(tmp_path / "x.safetensors"), {}, {"a": "b" * 2**23})


def test_a_changed_description_is_refused(tmp_path):
    """A flipped bit in a flag or a name is another network, or another class, with weights that are whole."""
    text = json.loads(safetensor_files.metadata(written(tmp_path))[KEY])
    path = str(tmp_path / "x.safetensors")
    for change in ({"config": {**text["config"], "num_heads": 2}}, {"class_names": [*text["class_names"][1:], "cat"]},
                   {"run": {**text["run"], "step": 8}}):
        with pytest.raises(UserError, match="does not match its own checksum, so it is damaged or was edited"):
            described.description(rewritten(path, text | change))
    del text["description_crc32"]                           # of a file of an older version, or edited on purpose
    about = described.description(rewritten(path, text | {"class_names": ["a", "b"]}))
    assert about is not None and about.class_names == ("a", "b")
