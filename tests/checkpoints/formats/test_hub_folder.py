"""Folders for model hubs: read as written, by their metadata or their config, and never in place of something else."""

import json

import pytest
import torch as th
from safetensors.torch import load_file, save_file

from cm.checkpoints import manifest
from cm.checkpoints.formats import hub_folder
from cm.checkpoints.formats.described import Description
from cm.config.schema import DiffusionConfig, ModelConfig
from cm.errors import UserError
from support.weights import TINY, adopt, tiny

CONFIG = {**vars(ModelConfig(**TINY)), **vars(DiffusionConfig()), "training_mode": "edm"}


@pytest.fixture
def folder(tmp_path):
    hub_folder.write(str(tmp_path / "m"), tiny().state_dict(), Description(CONFIG, tuple("abcde")), "# card\n", b"png")
    return tmp_path / "m"


def assert_loads(folder):
    settings, source = adopt(folder)
    expected = tiny().state_dict()
    assert settings.values["num_channels"] == TINY["num_channels"] and source.class_names == tuple("abcde")
    assert all(th.equal(value, expected[name]) for name, value in source.take().items())


def test_a_folder_needs_no_flag(folder):
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md", "samples.png"}
    assert_loads(folder)
    assert json.loads((folder / "config.json").read_text())["config"] == CONFIG


def test_its_file_of_weights_is_enough(folder):
    (folder / "config.json").unlink()
    assert_loads(folder / "model.safetensors")


def test_weights_that_another_program_wrote_anew(folder):
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    assert_loads(folder)


def test_two_descriptions_that_differ_are_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"sigma_max": 80.0', '"sigma_max": 90.0'))
    with pytest.raises(UserError, match="config.json and the metadata of .* differ in 'sigma_max'"):
        adopt(folder)


def test_a_card_that_was_edited_stays(folder):
    def again(card):
        hub_folder.write(str(folder), tiny().state_dict(), Description(CONFIG), card)
        return (folder / "README.md").read_text()

    assert again("# second\n") == "# second\n"
    (folder / "README.md").write_text("# mine\n")
    assert again("# third\n") == again("# fourth\n") == "# mine\n"


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_files_of_something_else_are_not_lost(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"contains another {name}"):
        hub_folder.write(str(tmp_path), {}, Description(CONFIG), "")
    assert [path.name for path in tmp_path.iterdir()] == [name] and not hub_folder.is_folder(str(tmp_path))


def test_a_run_is_not_covered(tmp_path):
    manifest.save(str(tmp_path), 1, {"model": {}}, CONFIG, 8)
    with pytest.raises(UserError, match="contains checkpoints of a run"):
        hub_folder.check_free(str(tmp_path))
