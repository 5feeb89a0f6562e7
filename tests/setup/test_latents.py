"""What a data set of latents and a checkpoint say to each other through the flags."""

import numpy as np
import pytest

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.data.latents import EDM2, LatentRecord
from cm.errors import UserError
from cm.setup.inherit import inherit_flags
from cm.setup.latents import take_latents
from support.latent_sets import edm2_zip

OTHER = LatentRecord((0.0,) * 4, (1.0,) * 4)


def training(*argv, inherited=None):
    settings = parse("", *TRAINING_SECTIONS, argv=list(map(str, argv)), training_mode="edm")
    if inherited is not None:
        inherit_flags(settings, {"channels": 4, "image_size": 8, **inherited}, (), "x.pt")
    take_latents(settings)
    return settings


def test_size_channels_and_record_follow_from_the_data(tmp_path, images):
    path = edm2_zip(tmp_path / "set.zip")
    values = training("--data_dir", path).values
    assert (values["channels"], values["image_size"], values["latents"]) == (4, 8, EDM2.text())
    assert training("--data_dir", path, "--channels", 4, "--image_size", 8).values == values
    for flag in ("channels", "image_size"):
        with pytest.raises(UserError, match=f"--{flag} asks for {flag}=16, but the latents of .*set.zip have"):
            training("--data_dir", path, f"--{flag}", 16)
    for other in (images, "digits", tmp_path / "nowhere.zip"):
        assert training("--data_dir", other).values["latents"] == ""


def test_a_checkpoint_and_its_data_must_have_the_same_latents(tmp_path):
    path = edm2_zip(tmp_path / "set.zip")
    known = LatentRecord(EDM2.mean, EDM2.std, vae="sd", sha256="ab")
    settings = training("--data_dir", path, inherited={"latents": known.text()})
    assert settings.values["latents"] == known.text(), "the VAE, which the set does not know, is kept"
    own = edm2_zip(tmp_path / "own.zip", record={"mean": [1, 1, 1, 1], "std": [1, 1, 1, 1]})
    with pytest.raises(UserError, match="the checkpoint x.pt and .*own.zip have different latents: mean"):
        training("--data_dir", own, inherited={"latents": OTHER.text()})
    with pytest.raises(UserError, match="--latents and the checkpoint have different latents"):
        training("--latents", EDM2.text(), inherited={"latents": OTHER.text()})


def test_a_checkpoint_without_a_record_leaves_it_to_the_flag(tmp_path, capsys):
    assert training("--latents", OTHER.text(), inherited={}).values["latents"] == OTHER.text()
    training("--data_dir", edm2_zip(tmp_path / "set.zip"), inherited={"latents": ""})
    assert "does not say how its latents were scaled" in "".join(capsys.readouterr())


def test_latents_that_could_be_pictures_are_refused(tmp_path):
    path = edm2_zip(tmp_path / "set.zip", np.zeros((2, 6, 8, 8)))
    with pytest.raises(UserError, match="latents of 3 channels, which cannot be distinguished from images"):
        training("--data_dir", path)


def test_a_record_of_other_channels_is_refused():
    with pytest.raises(UserError, match="--latents is for latents of 4 channels, but --channels is 3"):
        training("--latents", EDM2.text())


def test_a_manifest_with_a_broken_record_is_refused():
    with pytest.raises(UserError, match="the checkpoint: .*is not a record of latents"):
        training(inherited={"latents": "{}"})
