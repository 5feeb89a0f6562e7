"""The clock of a network: how fast it runs, who is warned, and how checkpoints carry it."""

import inspect
import math
from pathlib import Path

import pytest
import torch as th

from cm.checkpoints import manifest
from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.logging import logger
from cm.networks.edm.song_unet import FourierEmbedding
from cm.objectives import OBJECTIVES
from cm.setup.clock import FREQUENCY, check_clock, clock_speed, warn_of_fast_clock
from cm.setup.inherit import inherit_checkpoint, inherit_resumed
from cm.setup.model import create_diffusion, diffusion_from
from cm.setup.rules import inherit_teacher
from support.training import network


def settings_of(*argv, mode="edm"):
    return parse("", *TRAINING_SECTIONS, argv=argv, training_mode=mode)


@pytest.mark.parametrize("arch, time_scale, speed", [
    ("unet", 0, 250), ("unet", 1, 0.25), ("ddpmpp", 0, 0.25), ("adm", 0, 0.25), ("ncsnpp", 0, 8 * math.pi),
    ("edm2", 0, math.pi / 2),
    ("ncsnpp", 0.00125, 2 * math.pi * 0.02 / 4),            # iCT's NCSN++, whose embedding has the scale 0.02
])
def test_the_speed_is_that_of_the_fastest_wave(arch, time_scale, speed):
    assert clock_speed(create_diffusion(arch=arch, time_scale=time_scale), arch) == pytest.approx(speed, rel=1e-6)


def test_the_waves_of_ncsnpp_are_those_of_its_embedding():
    scale = inspect.signature(FourierEmbedding).parameters["scale"].default
    assert FREQUENCY["ncsnpp"] == 2 * math.pi * scale


@pytest.mark.parametrize("mode, argv, warned", [
    ("ect", (), True), ("ict", (), True), ("consistency_distillation", (), False),
    ("ect", ("--time_scale", "1"), False), ("ict", ("--arch", "ddpmpp"), False), ("ict", ("--arch", "ncsnpp"), True),
])
def test_who_is_warned(monkeypatch, mode, argv, warned):
    said = []
    monkeypatch.setattr(logger, "warn", said.append)
    settings = settings_of(*argv, mode=mode)
    warn_of_fast_clock(settings, diffusion_from(settings, OBJECTIVES[mode].distillation))
    assert len(said) == warned
    if mode == "ect" and warned:
        assert "by 250 radians per unit of ln sigma" in said[0] and "--time_scale 4" in said[0]


def test_the_network_is_told_so():
    told = []

    def model(x, time):
        told.append(time)
        return x

    sigma = th.tensor([0.5, 2.0])
    for time_scale in (0, 3):
        create_diffusion(time_scale=time_scale).denoise(model, th.zeros(2, 3, 4, 4), sigma)
    th.testing.assert_close(told[0], 250 * sigma.log())
    th.testing.assert_close(told[1], 0.75 * sigma.log())


def test_a_scale_of_numbered_steps_is_refused():
    with pytest.raises(UserError, match="--time_scale 2: with --precond iddpm .*no scale"):
        check_clock(settings_of("--time_scale", "2", "--precond", "iddpm"))
    check_clock(settings_of("--time_scale", "2", "--precond", "ve"))


SIZE = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8",
        "num_head_channels": 32, "class_cond": True, "num_classes": 3, "training_mode": "edm"}


@pytest.fixture
def saved(tmp_path):
    """Saves a network in a folder with a manifest of these flags."""
    def save(**flags):
        manifest.save(str(tmp_path), 5, {"model": network().state_dict()}, SIZE | flags, 40)
        return str(tmp_path / "model000005.pt")

    return save


def test_a_checkpoint_carries_its_clock(saved):
    path = saved(time_scale=1.0)
    for flag in ("teacher_model_path", "resume_checkpoint"):
        settings = settings_of(f"--{flag}", path)
        inherit_checkpoint(settings, flag)
        assert settings.values["time_scale"] == 1


@pytest.mark.parametrize("flags", [{"time_scale": 1.0}, {}])
def test_a_student_keeps_its_teachers_clock(saved, flags):
    """A checkpoint without the flag has the clock of its architecture."""
    settings = settings_of("--teacher_model_path", saved(**flags), "--time_scale", "2", mode="ect")
    with pytest.raises(UserError, match="--time_scale asks for time_scale=2.0, but .* was made with time_scale="):
        inherit_teacher(settings)


def test_a_fine_tuned_diffusion_model_may_have_a_new_clock(saved):
    settings = settings_of("--resume_checkpoint", saved(), "--time_scale", "1")
    inherit_resumed(settings)
    assert settings.values["time_scale"] == 1 and settings.values["num_channels"] == 32


def test_weights_without_a_manifest_have_the_clock_that_is_asked_for(saved, tmp_path):
    path = tmp_path / "alone" / "bare.pt"
    path.parent.mkdir()
    path.write_bytes(Path(saved()).read_bytes())
    settings = settings_of("--resume_checkpoint", str(path), "--time_scale", "1", "--image_size", "8",
                           "--num_head_channels", "32")
    inherit_resumed(settings)
    assert settings.values["time_scale"] == 1
