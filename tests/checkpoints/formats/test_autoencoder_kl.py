"""Folders of a diffusers AutoencoderKL: read as data, the same network as diffusers', and what is refused."""

import json
import pickle
import sys

import pytest
import torch as th
from safetensors.torch import load_file, save_file

from cm.checkpoints.formats import autoencoder_kl
from cm.checkpoints.formats.autoencoder_kl import read
from cm.errors import UserError
from support.tiny_vae import tiny_vae

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    tiny_vae(tmp_path / "vae")
    return tmp_path / "vae"


def reset(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def same(model, expected):
    found, wanted = model.state_dict(), expected.state_dict()
    return found.keys() == wanted.keys() and all(map(th.equal, found.values(), wanted.values()))


def test_both_formats_and_the_names_of_old_files_are_the_same_vae(folder):
    expected = tiny_vae()
    found = read(str(folder), "vae")
    assert same(found.model, expected) and not found.model.training
    assert (found.name, found.channels, found.factor) == ("vae", 4, 2) and len(found.sha256) == 64
    weights = load_file(folder / FILE)
    (folder / FILE).unlink()
    th.save(weights, folder / "diffusion_pytorch_model.bin")
    assert read(str(folder), "vae")[1:] == found[1:]
    old = {}                                # attention as in stabilityai/sd-vae-ft-mse, and in still older files
    for name, value in weights.items():
        for before, now in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{before}.")
        old[name] = value[..., None, None].clone() if ".query.weight" in name else value
    assert "encoder.mid_block.attentions.0.query.weight" in old
    save_file(old, folder / FILE)
    again = read(str(folder), "vae")
    assert same(again.model, expected) and again.sha256 == found.sha256


def test_other_weights_have_another_digest(folder, tmp_path):
    tiny_vae(tmp_path / "other", seed=1)
    assert read(str(folder), "vae").sha256 != read(str(tmp_path / "other"), "vae").sha256


@pytest.mark.parametrize("settings, says", [
    (dict(_class_name="UNet2DModel"), "holds a 'UNet2DModel', not an AutoencoderKL"),
    (dict(in_channels=1), "RGB images"),
    (dict(latent_channels=3), "look like images"),
    (dict(block_out_channels=[8, -1]), "not valid sizes of a network"),
    (dict(layers_per_block=10**9), "not valid sizes of a network"),
    (dict(down_block_types=["os.system", "x"]), "is not one of DownEncoderBlock2D"),
    (dict(act_fn="nothing"), "does not describe an AutoencoderKL"),
    (dict(strange=1), "does not describe an AutoencoderKL"),
    (dict(block_out_channels=[8, 10**12], norm_num_groups=1), "does not describe an AutoencoderKL"),
    (dict(block_out_channels=[8, 10**6], norm_num_groups=1), "does not fit"),
])
def test_settings_of_no_vae_are_refused(folder, settings, says):
    reset(folder, **settings)
    with pytest.raises(UserError, match=says):
        read(str(folder), "vae")


def test_folders_without_a_part_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="--vae .*nowhere is not a folder of a VAE"):
        read(str(tmp_path / "nowhere"), "vae")
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:1000])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read(str(folder), "vae")
    (folder / FILE).unlink()
    with pytest.raises(UserError, match="has no weights"):
        read(str(folder), "vae")


def test_no_code_of_a_folder_runs(folder, tmp_path):
    class Runs:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (folder / FILE).unlink()
    th.save({"encoder.conv_in.weight": Runs()}, folder / "diffusion_pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(UserError, match="diffusion_pytorch_model.bin"):
        read(str(folder), "vae")
    assert not (tmp_path / "ran").exists()


def test_without_diffusers_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.autoencoder_kl", None)
    with pytest.raises(UserError, match="needs the package diffusers: pip install"):
        read(str(folder), "vae")
    assert autoencoder_kl.digest({"b": th.ones(1), "a": th.zeros(1)}) == autoencoder_kl.digest(
        {"a": th.zeros(1), "b": th.ones(1)}), "the order of a file does not matter"
