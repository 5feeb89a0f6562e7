"""Grey images and latents through the real commands: train, sample, look, evaluate."""

import json
import sys

import numpy as np
import pytest
import torch as th
from PIL import Image

from cm.errors import UserError
from cm.logging import logger
from evaluations.features import save_torchscript
from support.as_module import as_module
from support.commands import NETWORK
from support.mpi import ROOT

TINY = [*NETWORK[:-2], "--log_interval", "1", "--lr", "1e-3"]


@pytest.fixture
def command(monkeypatch):
    """Run a command's main in this process, on one rank."""
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv")

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        script = as_module(ROOT / name)
        try:
            script.main(script.read_flags())
        finally:
            logger.reset()

    return run


def train(command, folder, data, channels, *options):
    command("scripts/edm_train.py", *TINY, "--data_dir", data, "--channels", channels, "--global_batch_size", 4,
            "--total_training_steps", 2, "--sample_interval", 2, "--eval_steps", 2, "--log_dir", folder, *options)
    return folder / "ema_0.9999_000002.pt"


class Moments(th.nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.float().flatten(1)[:, :6] + x.float().mean(dim=(1, 2, 3))[:, None]


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    path = tmp_path_factory.mktemp("extractor") / "moments.pt"
    save_torchscript(Moments(), str(path), "moments", "none")
    return path


def test_grey_images_stay_grey_from_the_data_to_the_samples(command, tmp_path, extractor, capsys):
    np.savez(tmp_path / "ref.npz", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8))
    run = tmp_path / "run"
    model = train(command, run, "digits", 1, "--eval_interval", 2, "--eval_ref", tmp_path / "ref.npz",
                  "--eval_samples", 8, "--inception", extractor, "--trust_extractor")
    assert json.loads((run / "checkpoint_000002.json").read_text())["config"]["channels"] == 1
    assert json.loads((run / "best.json").read_text())["value"] > 0
    assert Image.open(run / "samples/samples_000002.png").mode == "L"
    command("scripts/image_sample.py", "--model_path", model, "--num_samples", 5, "--steps", 2, "--log_dir",
            tmp_path / "npz")
    samples = np.load(tmp_path / "npz/samples_5x8x8x1.npz")["arr_0"]
    assert samples.shape == (5, 8, 8, 1) and samples.dtype == np.uint8
    assert Image.open(tmp_path / "npz/samples_5x8x8x1.png").mode == "L"
    command("scripts/image_sample.py", "--model_path", model, "--seeds", "0-4", "--steps", 2, "--outdir",
            tmp_path / "png", "--log_dir", tmp_path / "png_log")
    pictures = [Image.open(tmp_path / f"png/{seed:06d}.png") for seed in range(5)]
    assert {picture.mode for picture in pictures} == {"L"} == {Image.open(tmp_path / "png_log/grid.png").mode}
    assert abs(np.stack([np.asarray(picture) for picture in pictures]).astype(int) - samples[..., 0]).max() <= 1

    bare = tmp_path / "bare.pt"                             # no manifest: the input convolution tells
    bare.write_bytes(model.read_bytes())
    command("scripts/image_sample.py", "--model_path", bare, "--image_size", 8, "--num_head_channels", 32,
            "--training_mode", "edm", "--num_samples", 5, "--steps", 2, "--log_dir", tmp_path / "bare")
    assert np.array_equal(np.load(tmp_path / "bare/samples_5x8x8x1.npz")["arr_0"], samples)

    capsys.readouterr()
    command("scripts/edm_train.py", *TINY, "--data_dir", "digits", "--channels", 1, "--dry_run_ranks", 1, "--dry_run")
    grey = json.loads(capsys.readouterr().out)
    command("scripts/edm_train.py", *TINY, "--data_dir", "digits", "--dry_run_ranks", 1, "--dry_run")
    colour = json.loads(capsys.readouterr().out)
    assert colour["parameters"] - grey["parameters"] == 2 * 32 * 9 * 2 + 2, "of the first and last convolution"
    assert grey["memory"]["activations_estimate"] < colour["memory"]["activations_estimate"]


@pytest.mark.parametrize("channels", [4, 8])
def test_latents_from_npz_to_npz(command, tmp_path, channels):
    latents = 3 * np.random.default_rng(0).normal(size=(6, 8, 8, channels))
    np.savez(tmp_path / "latents.npz", latents)
    model = train(command, tmp_path / "run", tmp_path / "latents.npz", channels)
    assert Image.open(tmp_path / "run/samples/samples_000002.png").mode == "L"
    command("scripts/image_sample.py", "--model_path", model, "--num_samples", 3, "--steps", 2, "--log_dir",
            tmp_path / "npz")
    samples = np.load(tmp_path / f"npz/samples_3x8x8x{channels}.npz")["arr_0"]
    assert samples.dtype == np.float32 and abs(samples).max() > 1, "no clamp to [-1, 1]"
    with pytest.raises(UserError, match="--outdir .* is for pictures, of 1 or 3 channels.*npz"):
        command("scripts/image_sample.py", "--model_path", model, "--seeds", "0", "--outdir", tmp_path / "png")
    train(command, tmp_path / "again", tmp_path / f"npz/samples_3x8x8x{channels}.npz", channels)
    with pytest.raises(UserError, match="with --channels C .it is 3 here"):
        train(command, tmp_path / "three", tmp_path / "latents.npz", 3)
