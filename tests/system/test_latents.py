"""The whole path of latents through the real commands: images, encode, train, sample, decode, evaluate."""

import json
import shlex
import sys

import numpy as np
import pytest
import torch as th
from PIL import Image

import cm
from cm.checkpoints import manifest
from cm.checkpoints.formats import autoencoder_kl
from cm.data.latents import parse
from cm.errors import UserError
from cm.generate.grids import LINE, captioned_grid
from cm.generate.npz import to_uint8
from cm.logging import logger
from evaluations.evaluator import evaluate
from evaluations.features import load_extractor, save_torchscript
from support.as_module import as_module
from support.mpi import ROOT
from support.tiny_vae import pictures, tiny_vae

TINY = ["--num_channels", 32, "--num_res_blocks", 1, "--channel_mult", 1, "--attention_resolutions", 8,
        "--num_head_channels", 32, "--class_cond", True, "--log_interval", 1, "--lr", 1e-3, "--global_batch_size", 4]


@pytest.fixture(scope="module")
def command():
    """Run a command's main in this process, on one rank."""
    def run(name, *argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_LOG_FORMAT", "log,csv")
            patch.setattr(sys, "argv", [name, *map(str, argv)])
            script = as_module(ROOT / name)
            try:
                if name == "datasets/encode.py":
                    script.encode(script.parse())
                else:
                    script.main(script.read_flags())
            finally:
                logger.reset()

    return run


class Moments(th.nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.float().flatten(1)[:, :6] + x.float().mean(dim=(1, 2, 3))[:, None]


@pytest.fixture(scope="module")
def place(tmp_path_factory, command):
    """A folder with images, a VAE, the latents, an extractor of features, and a run of three steps, measured."""
    folder = tmp_path_factory.mktemp("latents")
    np.savez(folder / "ref.npz", pictures(folder / "images"))
    tiny_vae(folder / "vae")
    save_torchscript(Moments(), str(folder / "extractor.pt"), "moments", "none")
    command("datasets/encode.py", "--vae", folder / "vae", "--source", folder / "images", "--dest", folder / "set.zip")
    command("scripts/edm_train.py", "--data_dir", folder / "set.zip", *TINY, "--total_training_steps", 3, "--log_dir",
            folder / "run", "--vae", folder / "vae", "--sample_interval", 3, "--eval_steps", 2, "--eval_interval", 3,
            "--eval_ref", folder / "ref.npz", "--eval_samples", 8, "--inception", folder / "extractor.pt",
            "--trust_extractor")
    return folder


def model_of(place):
    return place / "run/ema_0.9999_000003.pt"


def sample(command, place, log_dir, *options):
    command("scripts/image_sample.py", "--model_path", model_of(place), "--num_samples", 5, "--steps", 2,
            "--log_dir", place / log_dir, *options)
    return place / log_dir


def test_training_sees_latents_and_shows_pictures(place):
    config = json.loads((place / "run/checkpoint_000003.json").read_text())["config"]
    record = parse(config["latents"], "")
    assert (config["channels"], config["image_size"], record.vae) == (4, 8, "vae")
    assert not config["random_flip"]
    assert (place / "run/best.json").exists(), "the distance is that of decoded pictures"
    assert json.loads((place / "run/best.json").read_text())["settings"]["vae"] == record.sha256
    grid = Image.open(place / "run/samples/samples_000003.png")
    assert grid.mode == "RGB"
    assert grid.height == 8 * (64 + LINE + 1) - 1, "the class of each is below it"


def test_samples_are_decoded_with_the_vae_and_latents_without(command, place, capsys):
    raw = np.load(sample(command, place, "raw") / "samples_5x8x8x4.npz")
    assert "the samples stay latents of 4 channels" in (place / "raw/log.txt").read_text()
    decoded = np.load(sample(command, place, "decoded", "--vae", place / "vae") / "samples_5x16x16x3.npz")
    record = parse(json.loads((place / "run/checkpoint_000003.json").read_text())["config"]["latents"], "")
    x = raw["arr_0"].transpose(0, 3, 1, 2)
    z = x * 2 * np.array(record.std)[:, None, None] + np.array(record.mean)[:, None, None]
    with th.no_grad():
        pixels = tiny_vae().decode(th.from_numpy(z).float()).sample     # in [0, 1]
    expected = (pixels.clamp(0, 1) * 255).to(th.uint8).permute(0, 2, 3, 1).numpy()
    assert decoded["arr_0"].dtype == np.uint8 and decoded["arr_0"].std() > 1
    assert abs(decoded["arr_0"].astype(int) - expected).max() <= 1
    assert np.array_equal(raw["arr_1"], decoded["arr_1"]) and decoded["class_names"].tolist() == ["cat", "dog"]
    grid = Image.open(place / "decoded/samples_5x16x16x3.png")
    names = ["cat" if label == 0 else "dog" for label in decoded["arr_1"]]
    assert grid.tobytes() == captioned_grid(decoded["arr_0"], names, 8, 4).tobytes(), "with their classes"

    command("scripts/image_sample.py", "--model_path", model_of(place), "--seeds", "0-4", "--steps", 2, "--vae",
            place / "vae", "--outdir", place / "png", "--log_dir", place / "png_log", "--vae_batch_size", 2)
    found = np.stack([np.asarray(Image.open(place / f"png/{seed:06d}.png")) for seed in range(5)])
    assert Image.open(place / "png_log/grid.png").tobytes() == captioned_grid(found, names, 8, 4).tobytes()
    assert abs(found.astype(int) - decoded["arr_0"]).max() <= 1

    from evaluations import evaluator

    capsys.readouterr()
    evaluator.main([str(place / "ref.npz"), str(place / "decoded/samples_5x16x16x3.npz"), "--metrics", "fid",
                    "--inception", str(place / "extractor.pt"), "--trust_extractor"])
    assert "samples: N=5; reference: N=12" in capsys.readouterr().out


def test_from_python(place):
    pipeline = cm.load(model_of(place), precision="fp32")
    tensor = pipeline.sample(3, steps=2, seed=42, vae=str(place / "vae"), output="tensor", sampler="heun")
    raw = pipeline.sample(3, steps=2, seed=42, output="tensor", sampler="heun")
    assert tensor.shape == (3, 3, 16, 16) and raw.shape == (3, 4, 8, 8)
    images = pipeline.sample(3, steps=2, seed=42, vae=str(place / "vae"), sampler="heun", batch_size=2)
    assert abs(np.stack(images).astype(int) - to_uint8(tensor, nearest=True)).max() <= 1
    with pytest.raises(UserError, match="task denoise is defined on pixels.* choose one of: inpaint, stroke; or"):
        pipeline.edit(images, "denoise", vae=str(place / "vae"))
    pipeline.save(str(place / "saved"))
    again = cm.load(place / "saved", precision="fp32")
    assert again.config["latents"] == pipeline.config["latents"] != "", "what is saved knows how its latents are scaled"


def test_a_picture_is_edited_through_the_vae(command, place):
    """The command and Python; what is known stays as it is to the last pixel."""
    options = ("--model_path", model_of(place), "--vae", place / "vae", "--steps", 2)
    command("scripts/image_edit.py", "--task", "inpaint", "--images", place / "images", "--mask_box", "3,2,8,9",
            "--num_samples", 3, "--log_dir", place / "edited", *options)
    known = np.ones((16, 16), bool)
    known[3:11, 2:11] = False
    originals = np.load(place / "ref.npz")["arr_0"][:3]
    edited, shown = (np.load(place / f"edited/{kind}_3x16x16x3.npz") for kind in ("samples", "inputs"))
    assert np.array_equal(edited["arr_0"][:, known], originals[:, known]) and edited["arr_1"].tolist() == [0, 0, 0]
    assert (edited["arr_0"][:, ~known] != originals[:, ~known]).mean() > 0.9
    assert np.array_equal(shown["arr_0"], originals * known[..., None])
    assert json.loads((place / "edited/samples_3x16x16x3.json").read_text())["vae"] == "vae"
    pipeline = cm.load(model_of(place), precision="fp32")
    same = pipeline.edit(originals, "inpaint", mask=known, labels=0, seed=42, steps=2, vae=str(place / "vae"),
                         output="array")
    assert abs(same.astype(int) - edited["arr_0"]).max() <= 1

    command("scripts/image_edit.py", "--task", "interpolate", "--interpolate_pairs", "0:1", "--interpolate_weights", 0,
            "--log_dir", place / "between", *options)
    between = np.load(place / "between/samples_1x16x16x3.npz")["arr_0"]
    command("scripts/image_sample.py", "--num_samples", 1, "--log_dir", place / "drawn", *options)
    drawn = np.load(place / "drawn/samples_1x16x16x3.npz")["arr_0"]
    assert abs(between.astype(int) - drawn).max() <= 1, "the ends of an arc are the samples themselves"
    with pytest.raises(UserError, match="--task colorize is defined on pixels.*or use a model of images"):
        command("scripts/image_edit.py", "--task", "colorize", "--images", place / "images", *options)
    with pytest.raises(UserError, match="leaves no square of 2x2 pixels known"):
        command("scripts/image_edit.py", "--images", place / "images", "--mask_box", "0,0,16,15", *options)


def remade(place, folder, **config):
    """The weights of the run as a checkpoint whose config has other values, under the name of an average."""
    checkpoint = manifest.read(str(place / "run/checkpoint_000003.json"))
    weights = th.load(model_of(place))
    manifest.save(str(folder), 3, {"ema_power0.05": weights}, checkpoint.config | config, 12)
    return folder / "ema_power0.05_000003.pt"


def test_schedules_and_averages_are_measured_by_pictures(command, place, tmp_path):
    model = remade(place, tmp_path / "model", training_mode="consistency_training")
    measured = ("--inception", place / "extractor.pt", "--trust_extractor", "--num_samples", 6, "--steps", 3)
    with pytest.raises(UserError, match="this run has latents of 4 channels.*--vae FOLDER decodes them"):
        command("scripts/ternary_search.py", "--model_path", model, "--ref_batch", place / "ref.npz", *measured)
    measured += ("--vae", place / "vae")
    command("scripts/ternary_search.py", "--model_path", model, "--ref_batch", place / "ref.npz", *measured,
            "--log_dir", tmp_path / "search")
    result = json.loads((tmp_path / "search/ternary_search.json").read_text())
    assert result["ts"] == "0,1,2" and f"--vae {place / 'vae'}" in result["command"]
    assert result["settings"]["vae"] == autoencoder_kl.read(str(place / "vae"), "vae").sha256

    command("scripts/image_sample.py", *shlex.split(result["command"])[2:], "--log_dir", tmp_path / "samples")
    extractor = load_extractor(str(place / "extractor.pt"), trusted=True)
    samples = str(tmp_path / "samples/samples_6x16x16x3.npz")
    theirs = evaluate(str(place / "ref.npz"), samples, extractor, metrics=["fid"])["metrics"]["frechet_distance"]
    assert result["frechet_distance"] == pytest.approx(theirs["value"], rel=1e-4)   # batches round otherwise

    command("scripts/posthoc_ema.py", tmp_path / "model", "--ref", place / "ref.npz", *measured, "--sampler",
            "multistep", "--ts", "0,1,2", "--log_dir", tmp_path / "made")
    row, = json.loads((tmp_path / "made/posthoc_ema.json").read_text())["averages"]
    assert row["distance"] == pytest.approx(theirs["value"], rel=1e-3), "of the same weights"
    with pytest.raises(UserError, match="--vae .* has no effect without --ref"):
        command("scripts/posthoc_ema.py", tmp_path / "model", "--vae", place / "vae")


def test_a_run_that_is_resumed_draws_what_it_would_have_drawn(command, place):
    def run(name, steps):
        command("scripts/edm_train.py", "--data_dir", place / "set.zip", *TINY, "--total_training_steps", steps,
                "--log_dir", place / name, "--save_interval", 2)
        return (place / name / f"model{steps:06d}.pt").read_bytes()

    run("halves", 2)
    assert run("halves", 4) == run("whole", 4)


def test_a_dry_run_counts_the_vae_and_refuses_a_wrong_one(command, place, capsys):
    def plan(vae):
        capsys.readouterr()
        command("scripts/edm_train.py", "--data_dir", place / "set.zip", *TINY, "--total_training_steps", 1, "--vae",
                vae, "--sample_interval", 1, "--dry_run", "--log_dir", place / "planned")
        return json.loads(capsys.readouterr().out)

    held = plan(place / "vae")["memory"]["device"]["VAE that decodes"]
    numbers = sum(param.numel() for param in tiny_vae().parameters())
    assert 4 * numbers < held < 4 * numbers + 20_000, "its file, with a header"
    tiny_vae(place / "wrong", seed=2)
    with pytest.raises(UserError, match="wrong is not the VAE"):
        plan(place / "wrong")


def test_other_latents_and_vaes_are_refused(command, place):
    tiny_vae(place / "other", seed=1)
    with pytest.raises(UserError, match="other is not the VAE that the latents .* the record is of the VAE 'vae'"):
        sample(command, place, "wrong", "--vae", place / "other")
    with pytest.raises(UserError, match="--vae .* has no effect without --eval_interval or --sample_interval"):
        command("scripts/edm_train.py", "--data_dir", place / "set.zip", *TINY, "--vae", place / "vae")
    with pytest.raises(UserError, match="makes pictures of 3 channels, not latents; drop it"):
        command("scripts/edm_train.py", "--data_dir", "digits", *TINY, "--image_size", 8, "--vae", place / "vae",
                "--sample_interval", 1, "--total_training_steps", 1, "--log_dir", place / "pictures")
    command("datasets/encode.py", "--vae", place / "other", "--source", place / "images", "--dest", place / "other.zip")
    with pytest.raises(UserError, match="checkpoint_000003.json and this run have different latents"):
        command("scripts/edm_train.py", "--data_dir", place / "other.zip", *TINY, "--total_training_steps", 4,
                "--log_dir", place / "run")
    with pytest.raises(UserError, match="the checkpoint .* and .*other.zip have different latents"):
        command("scripts/edm_train.py", "--data_dir", place / "other.zip", *TINY, "--total_training_steps", 1,
                "--resume_checkpoint", model_of(place), "--log_dir", place / "finetuned")
