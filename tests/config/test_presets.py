"""A preset is found by its name, from any folder; a name that is none gets the nearest."""

import dataclasses

import pytest

from cm.config import presets
from cm.config.config_file import read_config
from cm.config.flags import parse
from cm.config.sampling_schema import GuidanceConfig, PngConfig, SampleConfig, SeedsConfig, SolverConfig
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError

SECTIONS = (*TRAINING_SECTIONS, SampleConfig, SolverConfig, GuidanceConfig, SeedsConfig, PngConfig)
FIELDS = {field.name: field for section in SECTIONS for field in dataclasses.fields(section)}


@pytest.mark.parametrize("name", ["digits/edm", "digits/edm.yaml", "configs/digits/edm.yaml"])
def test_a_preset_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    settings = parse("", *TRAINING_SECTIONS, argv=["--config", name])
    assert settings.values["data_dir"] == "digits" and settings.given["data_dir"].text == name


def test_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/edm").write_text("lr: 0.5")
    assert parse("", *TRAINING_SECTIONS, argv=["--config", "digits/edm"]).values["lr"] == 0.5


def test_a_name_that_is_none():
    with pytest.raises(UserError, match="No such file or directory; did you mean the preset digits/edm?"):
        parse("", *TRAINING_SECTIONS, argv=["--config", "digit/edm"])


def test_every_preset_has_a_name():
    assert "cifar10/cd" in presets.names() and len(presets.names()) > 40


def test_presets_of_ones_own_data_choose_their_precision():
    """Those of published settings keep what was published."""
    for name in presets.names():
        folder = name.split("/")[0]
        given = read_config(name, FIELDS).get("precision", "")
        assert (given == "auto") == (folder in ("digits", "size")), name
