"""The files of DDIM's and SA-DPM's own code are told what they are, wherever they are given."""

import sys

import pytest
import torch as th

import cm
from cm.checkpoints.formats import ddim_unet
from cm.errors import UserError
from support.as_module import as_module
from support.mpi import ROOT

SAYS = ("model_5_ema.pth holds the U-Net of the published code of DDIM and SA-DPM "
        ".*or train a new model with --objective sadpm")
NAMES = [*ddim_unet.NAMES, "down.0.downsample.conv.weight", "norm_out.weight", "conv_out.weight"]


def state(prefix=""):
    return {prefix + name: th.zeros(2, 2) for name in NAMES}


@pytest.fixture(params=["plain", "of DataParallel", "with its training"])
def file(tmp_path, request):
    content = {"plain": state(), "of DataParallel": state("module."),
               "with its training": [state("module."), {"param_groups": []}, 3, 5000, state()]}[request.param]
    th.save(content, tmp_path / "model_5_ema.pth")
    return tmp_path / "model_5_ema.pth"


@pytest.mark.parametrize("words", [
    ["image_sample.py", "--model_path"], ["image_sample.py", "--image_size", 8, "--num_channels", 32, "--model_path"],
    ["edm_train.py", "--data_dir", "digits", "--image_size", 8, "--resume_checkpoint"],
    ["cm_train.py", "--data_dir", "digits", "--loss_norm", "l2", "--teacher_model_path"],
    ["convert_checkpoint.py", "--dest", "out", "--source"],
])
def test_every_command_says_what_it_is(words, file, tmp_path, monkeypatch):
    name, *flags = map(str, words)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *flags, str(file), *([] if "convert" in name else ["--log_dir", "log"])])
    script = as_module(ROOT / "scripts" / name)
    with pytest.raises(UserError, match=SAYS):
        script.main(script.read_flags())


def test_python_says_it_too(file):
    with pytest.raises(UserError, match=SAYS):
        cm.load(file)


def test_other_files_are_let_through():
    for content in ({name: 0 for name in NAMES[1:]}, [], 3, {"model": state()}, {}):
        ddim_unet.refuse(content, "x")
