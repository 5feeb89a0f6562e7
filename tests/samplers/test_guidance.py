"""Classifier guidance: closed forms on mixtures, a real guide on the digits, and the commands around both."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml

from cm.checkpoints import manifest
from cm.config.flags import defaults_of, parse
from cm.config.sampling_schema import GuidanceConfig, PngConfig, SampleConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig
from cm.data.sources import open_source
from cm.diffusion.schedules import append_zero, karras_grid
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.networks.jvp import jvp
from cm.networks.noisy_classifier import NoisyClassifier, NoisyClassifierConfig, from_content, to_content
from cm.samplers import SAMPLERS, integrate, make_sampler
from cm.samplers.guidance import guided
from cm.script_util import create_model
from cm.setup.sample import inherit_model, load_classifier, png_recipe
from cm.training.classifier import to_images, train_noisy_classifier
from support.command_line import overridden
from support.commands import samples_of
from support.gaussian import Gaussian, Mixture, stored
from support.warm import mpiexec, python

ROOT = Path(__file__).resolve().parents[2]
SIDE, CLASSES = 8, 10


# --- closed forms ----------------------------------------------------------------------------------------------------


def log_posterior(x, sigma):
    """log p(component | x_sigma = x) of the stored mixture, up to a constant: [N,K]."""
    bed, d = Mixture.stored(), x.shape[1]
    v = bed.s**2 + sigma.reshape(-1, 1) ** 2
    return bed.w.log() - d / 2 * v.log() - (x[:, None] - bed.mu).square().sum(2) / (2 * v)


def component(k):
    bed = Mixture.stored()
    return Gaussian(bed.mu[k], bed.s[k].item())


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_moves_the_posterior_mean_from_the_mixture_to_the_component(scale):
    """D + s (D_y - D), since sigma^2 grad log p(y | x) is D_y - D: at scale 1 the denoiser of the class itself."""
    bed, x = Mixture.stored(), stored("st_x")[1]
    sigma = th.linspace(0.1, 5, len(x), dtype=x.dtype)
    y = th.arange(len(x)) % 3
    own = th.stack([component(k).D(x, sigma) for k in range(3)])[y, th.arange(len(x))]
    D = guided(bed.D, log_posterior, scale, class_cond=False)
    expected = bed.D(x, sigma) + scale * (own - bed.D(x, sigma))
    th.testing.assert_close(D(x, sigma, y=y), expected, rtol=1e-9, atol=1e-10)
    with th.inference_mode():
        th.testing.assert_close(D(x, sigma, y=y), expected, rtol=1e-9, atol=1e-10)


def test_a_forward_mode_pass_goes_through_the_guided_denoiser():
    bed, x, v = Mixture.stored(), stored("st_x")[1], stored("st_z1")
    sigma, y = th.full((len(x),), 0.8, dtype=x.dtype), th.full((len(x),), 2)
    D = guided(bed.D, log_posterior, 1.0, class_cond=False)
    with th.inference_mode():
        change = jvp(lambda z: D(z, sigma, y=y), (x,), (v,))[1]
    s = component(2).s
    th.testing.assert_close(change, s**2 / (s**2 + 0.8**2) * v, rtol=1e-8, atol=1e-9)


def test_the_class_is_told_to_a_network_that_takes_one():
    told = []

    def D(x, sigma, **cond):
        told.append(cond)
        return x

    x, sigma, y = th.zeros(2, 2), th.ones(2), th.tensor([0, 1])
    for tell in (True, False):
        guided(D, lambda x, sigma: x, 1.0, tell)(x, sigma, y=y)
    assert told == [{"y": y}, {}]


@pytest.mark.parametrize("name", ["heun", "ito"])
def test_guided_samplers_draw_from_the_class(name):
    """Mean and spread of a component; 2000 points err by 0.015."""
    rng = th.Generator().manual_seed(0)
    x = 80 * th.randn(2000, 2, generator=rng, dtype=th.float64)
    y = th.full((2000,), 1)
    D = guided(Mixture.stored().D, log_posterior, 1.0, class_cond=False)
    end = integrate(make_sampler(name, {}), lambda z, sigma: D(z, sigma, y=y), x, append_zero(karras_grid(40)), th)
    th.testing.assert_close(end.mean(0), component(1).mu, rtol=0, atol=0.06)
    assert end.std(0).tolist() == pytest.approx([component(1).s] * 2, rel=0.05)


# --- a real guide ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Made by the command; its file."""
    path = tmp_path_factory.mktemp("guide") / "new" / "guide.pt"
    done = python(["scripts/classifier_train.py", "--noised", "True", "--epochs", "8", "--out", path], timeout=200)
    assert done.rc == 0, done
    assert "at noise level 0.5: " in done.stdout and "100%" in done.stderr
    return path


def test_the_guide_knows_clean_and_noisy_digits(guide):
    facts = json.loads(guide.with_suffix(".json").read_text())
    assert facts["held_out_accuracy"] > 0.95 and facts["accuracy_by_sigma"]["0.5"] > 0.9
    assert facts["classes"] == CLASSES and facts["held_out_images"] + facts["training_images"] == 1797


def load(path):
    return from_content(dist.load_state_dict(path), str(path))


def test_guidance_brings_digits_of_the_class(guide):
    """The denoiser is the best one for the digits as they are, without classes, so that samples are digits: unguided,
    one of ten has its class; guided, most have. A learnt classifier pulls less than the true one, by half or more at
    the levels that decide, so that scales above 1 are the usual ones.
    """
    source = open_source("digits", SIDE)
    pixels = to_images(source.images(np.arange(len(source)))).flatten(1)     # [n,192]
    labels = th.as_tensor(source.labels)

    def closeness(x):                                               # -|x - pixels|^2, up to a constant: [N,n]
        return 2 * x.flatten(1) @ pixels.T - pixels.square().sum(1)

    def D(x, sigma):
        return ((closeness(x) / (2 * sigma[:, None] ** 2)).softmax(1) @ pixels).view_as(x)

    classifier, y = load(guide), th.arange(50) % CLASSES
    x = 80 * th.randn(50, 3, SIDE, SIDE, generator=th.Generator().manual_seed(0))
    shares = []
    for scale in (0.0, 3.0):
        denoise = guided(D, classifier, scale, class_cond=False)
        with th.inference_mode():
            end = integrate(make_sampler("heun", {}), lambda z, sigma: denoise(z, sigma, y=y),  # noqa: B023
                            x, append_zero(karras_grid(10)), th)
        shares.append((labels[closeness(end).argmax(1)] == y).float().mean().item())
    print("share of its class at scales 0 and 3:", shares)
    assert shares[0] < 0.25 and shares[1] > 0.45, shares            # 50 images: a share errs by 0.07


def test_a_guide_is_plain_data(guide, tmp_path):
    content = th.load(guide, weights_only=True)
    assert content["config"]["num_classes"] == CLASSES
    again = from_content(content, "guide.pt")
    x, sigma = th.randn(3, 3, SIDE, SIDE), th.tensor([0.1, 1.0, 10.0])
    assert th.equal(again(x, sigma), load(guide)(x, sigma)) and to_content(again)["format"] == content["format"]
    assert not any(param.requires_grad for param in again.parameters())
    with pytest.raises(UserError, match="other.pt is not a classifier of noisy images; train one with"):
        from_content({"weights": {}}, "other.pt")


def test_a_fresh_guide_has_no_opinion():
    model = NoisyClassifier(NoisyClassifierConfig(16, 5, channel_mult=(1, 2, 2), attention_factors=(2,)))
    assert th.equal(model(th.randn(2, 3, 16, 16), th.tensor([0.5, 80.0])), th.zeros(2, 5))


# --- the commands ----------------------------------------------------------------------------------------------------

NETWORK = {"image_size": SIDE, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1",
           "attention_resolutions": "8", "num_head_channels": 32}
QUIET = {"OPENAI_LOG_FORMAT": "log"}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A random network without classes."""
    room = tmp_path_factory.mktemp("network")
    th.manual_seed(0)
    network = create_model(**{**defaults_of(ModelConfig), **NETWORK})
    for param in network.parameters():
        th.nn.init.normal_(param, std=0.05)
    th.save(network.state_dict(), room / "model.pt")
    return room


def flags(room, script, *options):
    network = [word for name, value in NETWORK.items() for word in (f"--{name}", value)]
    mode = "edm" if script == "image_sample.py" else "consistency_distillation"
    return overridden(["--model_path", room / "model.pt", *network, "--training_mode", mode, *options])


@pytest.fixture
def command(room, tmp_path, monkeypatch):
    """Run a script in this process: the arrays it leaves, and its summary."""
    def run(script, *options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, value in QUIET.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [script, *flags(room, script, *options, "--log_dir", folder)])
        return samples_of(script, folder)

    return run


# The Taylor form draws random probes, too.
NEW = {
    "ddim": ("--eta", 1), "pc": ("--snr", 0.1, "--corrector_steps", 2), "sde": ("--s_tmax", 10),
    "ito": ("--rho", 3, "--eta", 0.7), "ito taylor": ("--ito_form", "taylor"), "pc vp": ("--pc_sde", "vp"),
    "ddim ddpm": ("--precond", "ddpm"),
}
# Of 5 steps, and the last.
COST = {"ddim": 6, "pc": 16, "sde": 6, "ito": 21, "ito taylor": 66, "pc vp": 11, "ddim ddpm": 6}


def same_images(a, b):
    """Batches of other sizes may round differently in the last bit, which truncation can show as one grey level."""
    return np.abs(a.astype(int) - b).max() <= 1 and (a != b).mean() < 0.02


@pytest.mark.parametrize("name", NEW)
def test_an_image_does_not_depend_on_its_batch(command, name):
    options = ("--sampler", name.split()[0], *NEW[name], "--steps", 6)
    together, summary = command("image_sample.py", *options, "--num_samples", 3, "--batch_size", 3)
    some, _ = command("image_sample.py", *options, "--seeds", "2", "--batch_size", 1)
    assert same_images(some["arr_0"], together["arr_0"][2:])
    assert len({image.tobytes() for image in together["arr_0"]}) == 3
    assert summary["network_evaluations"] == COST[name]


@pytest.mark.parametrize("options, lowest, highest", [
    ((), 0.01, 157.4), (("--sigma_max", 50), 0.01, 50), (("--sampler", "pc", "--pc_sde", "vp"), 0.01, 157.4),
    (("--sampler", "heun"), 0.01, 157.4), (("--sampler", "heun", "--sigma_max", 80), 0.01, 80),
    (("--precond", "edm"), 0.002, 80), (("--training_mode", "consistency_distillation"), 0.01, 80),
])
def test_no_timestep_is_left_out_of_a_diffusion_network_that_knows_them_all(room, options, lowest, highest):
    argv = flags(room, "image_sample.py", "--sampler", "ddim", "--precond", "ddpm", *options)
    settings = parse("", SampleConfig, SolverConfig, ModelConfig, DiffusionConfig, RunConfig, argv=argv)
    inherit_model(settings)
    assert settings.values["sigma_min"] == pytest.approx(lowest, rel=1e-3)
    assert settings.values["sigma_max"] == pytest.approx(highest, rel=1e-3)


def test_a_folder_of_pngs_remembers_solver_and_guide(room, guide):
    def recipe(*options):
        settings = parse("", SampleConfig, SolverConfig, GuidanceConfig, PngConfig, ModelConfig, DiffusionConfig,
                         RunConfig, argv=flags(room, "image_sample.py", "--sampler", "ito", *options))
        inherit_model(settings)
        return png_recipe(settings)

    plain, guided_by = recipe(), ("--classifier_path", guide)
    others = [recipe("--eta", 0.5), recipe(*guided_by), recipe(*guided_by, "--classifier_scale", 2)]
    assert plain == recipe() and all(plain != other for other in others) and others[1] != others[2]
    assert others[1]["classifier"]["size"] == guide.stat().st_size


GUIDED_ITO = ("--sampler", "ito", "--steps", 4, "--num_samples", 5, "--classifier_scale", 2)


@pytest.mark.mpi
def test_guided_ito_is_the_same_on_any_ranks(command, room, guide, tmp_path):
    """Noise and classes belong to samples: 2 ranks in batches of 2 against this process in one of 5."""
    options = (*GUIDED_ITO, "--classifier_path", guide)
    done = mpiexec(2, [str(ROOT / "scripts/image_sample.py"), *flags(room, "image_sample.py", *options),
                       "--batch_size", "2", "--log_dir", str(tmp_path / "two")], env=QUIET)
    assert done.rc == 0, done
    two = np.load(tmp_path / "two" / "samples_5x8x8x3.npz")
    one, _ = command("image_sample.py", *options, "--batch_size", 5)
    assert same_images(one["arr_0"], two["arr_0"])
    assert np.array_equal(one["arr_1"], two["arr_1"]) and len(set(two["arr_1"].tolist())) > 1
    plain, _ = command("image_sample.py", *GUIDED_ITO[:-2])
    assert "arr_1" not in plain and not same_images(plain["arr_0"], one["arr_0"])


@pytest.mark.parametrize("options", [("--sampler", "ito", "--steps", 4), ("--sampler", "ddim", "--steps", 4)])
def test_edits_take_the_new_samplers_and_a_guide(command, guide, options):
    edited, _ = command("image_edit.py", "--task", "inpaint", "--images", "digits", "--mask_box", "2,3,4,3",
                        "--num_samples", 2, *options, "--classifier_path", guide, "--class_label", 7)
    source = open_source("digits", SIDE).images(np.arange(2))
    known = np.ones((8, 8), bool)
    known[2:6, 3:6] = False
    assert np.array_equal(edited["arr_0"][:, known], source[:, known]) and edited["arr_1"].tolist() == [7, 7]


@pytest.mark.parametrize("options, message", [
    (("--sampler", "heun", "--eta", 1), "--eta 1.0 belongs to --sampler ddim, sde, ito, not to heun; drop one of them"),
    (("--sampler", "ddim", "--rho", 3), "--rho 3.0 belongs to --sampler .*, not to ddim"),
    (("--sampler", "sde", "--snr", 0.2), "--snr 0.2 belongs to --sampler pc, not to sde"),
    (("--sampler", "sde", "--ito_form", "taylor"), "--ito_form taylor belongs to --sampler ito, not to sde"),
    (("--sampler", "heun", "--ts", "0,2"), "--ts 0,2 is for --sampler multistep; --sampler heun does not use it"),
    (("--sampler", "pc", "--s_tmin", 1), r"samplers that add noise \(heun, euler, dpm, sde, "),
    (("--sampler", "ancestral", "--s_tmax", 1), "--s_tmax 1.0 is for samplers that add noise"),
    (("--sampler", "sde", "--s_noise", 1.1), r"is for samplers with churn \(heun, euler, dpm, "),
    (("--sampler", "ito", "--s_churn", 1), "--s_churn 1.0 is for samplers with churn"),
    (("--sampler", "ddim", "--eta", 1.5), "eta=1.5 must lie between 0"),
    (("--classifier_scale", 2), "--classifier_scale 2 needs a classifier: give --classifier_path"),
    (("--classifier_path", "nowhere.pt"), "--classifier_path nowhere.pt: no such file"),
    (("--class_label", 3), "not class-conditional"),
])
def test_flags_that_would_be_ignored_are_errors(command, options, message):
    with pytest.raises(UserError, match=message):
        command("image_sample.py", *options, "--steps", 3, "--num_samples", 1)


def test_a_guide_must_fit_the_model(command, tmp_path_factory):
    path = tmp_path_factory.mktemp("guides") / "large.pt"
    th.save(to_content(NoisyClassifier(NoisyClassifierConfig(16, 3))), path)
    with pytest.raises(UserError, match="large.pt is for images of side 16, the model makes them of side 8; train a"):
        command("image_sample.py", "--classifier_path", path, "--num_samples", 1)
    th.save(to_content(NoisyClassifier(NoisyClassifierConfig(8, 3, channels=1))), path)
    with pytest.raises(UserError, match="large.pt is for images of 1 channels, .*train a classifier with --channels 3"):
        command("image_sample.py", "--classifier_path", path, "--num_samples", 1)


def test_a_guide_of_grey_images_or_latents():
    for channels, kind in ((1, np.uint8), (4, np.float32)):
        config = NoisyClassifierConfig(8, 2, channels=channels)
        images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, channels)).astype(kind)
        guide = train_noisy_classifier(images, np.arange(8) % 2, config, epochs=1, batch_size=4, progress=False)
        assert from_content(to_content(guide), "x.pt")(th.zeros(1, channels, 8, 8), th.ones(1)).shape == (1, 2)
    old = to_content(NoisyClassifier(NoisyClassifierConfig(8, 3)))
    del old["config"]["channels"]                           # of files from before there was a choice
    assert from_content(old, "x.pt").config.channels == 3


def test_a_guide_that_numbers_its_classes_otherwise_is_refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    flags = {**defaults_of(ModelConfig), **NETWORK, "class_cond": True, "num_classes": 2, "training_mode": "edm"}
    model = create_model(**{name: flags[name] for name in defaults_of(ModelConfig)})
    manifest.save(str(folder), 1, {"model": model.state_dict()}, flags, 0, classes=("ant", "cat"))
    for names, fits in ((("cat", "ant"), False), (("ant", "cat", "dog"), True)):
        path = folder / "guide.pt"
        th.save(to_content(NoisyClassifier(NoisyClassifierConfig(8, len(names), class_names=names))), path)
        settings = parse("", SampleConfig, SolverConfig, GuidanceConfig, ModelConfig, DiffusionConfig, RunConfig, argv=[
            "--model_path", str(folder / "model000001.pt"), "--classifier_path", str(path)])
        inherit_model(settings)
        if fits:
            assert load_classifier(settings).config.class_names == names
        else:
            with pytest.raises(UserError, match="The classifier: cat, ant; the model: ant, cat"):
                load_classifier(settings)


def test_published_presets_of_ito():
    """EDM's levels at rho 3; ImageNet-64 with fresh noise up to 5."""
    expected = {"cifar10": (40, 3, float("inf")), "ffhq64": (84, 3, float("inf")), "imagenet64": (80, 3, 5)}
    for folder, row in expected.items():
        values = parse("", SampleConfig, SolverConfig, GuidanceConfig, ModelConfig, RunConfig,
                       argv=["--config", str(ROOT / "configs" / folder / "sample_ito.yaml")]).values
        assert values["sampler"] == "ito" and (values["steps"], values["rho"], values["s_tmax"]) == row
        own = yaml.safe_load((ROOT / "configs" / folder / "sample_ito.yaml").read_text())
        assert not own.keys() & {field.name for field in fields(ModelConfig)} - {"use_fp16"}, "of the network"
    assert set(NEW) >= {"ddim", "pc", "sde", "ito"} <= set(SAMPLERS)
