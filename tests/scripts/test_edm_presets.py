"""configs/edm: the published runs and samplers of EDM, as its table 7 and its README give them."""

from pathlib import Path

import pytest
import torch as th

from cm.config.flags import parse
from cm.config.sampling_schema import PngConfig, SampleConfig, SolverConfig
from cm.config.schema import DataConfig, DiffusionConfig, ModelConfig, RunConfig, TrainConfig
from cm.karras_diffusion import KarrasDenoiser
from cm.samplers import Churn
from cm.samplers.sample import SampleOptions, sample
from cm.setup.model import model_from
from cm.setup.sampler import sampler_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "edm"
SONG = {"total_kimg": 200_000, "lr_rampup_kimg": 10_000, "ema_halflife_kimg": 500, "optimizer": "adam"}
TRAINING = {                                                        # parameters in millions, and the recipe
    ("cifar10", "ddpmpp"): (55.73, SONG | {"global_batch_size": 512, "lr": 1e-3, "dropout": 0.13, "augment": 0.12}),
    ("cifar10", "ncsnpp"): (56.40, SONG | {"image_size": 32}),
    ("ffhq64", "ddpmpp"): (61.81, SONG | {"global_batch_size": 256, "lr": 2e-4, "dropout": 0.05, "augment": 0.15}),
    ("ffhq64", "ncsnpp"): (62.76, SONG | {"image_size": 64}),
    ("afhqv2_64", "ddpmpp"): (61.81, SONG | {"global_batch_size": 256, "dropout": 0.25, "augment": 0.15}),
    ("imagenet64", "adm"): (295.90, {"global_batch_size": 4096, "lr": 1e-4, "total_kimg": 2_500_000, "augment": 0.0,
                                     "ema_halflife_kimg": 50_000, "dropout": 0.1, "use_fp16": True}),
}


@pytest.mark.parametrize("name, arch", TRAINING)
def test_published_runs(name, arch):
    millions, recipe = TRAINING[name, arch]
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), *(["--arch", "ncsnpp"] if arch == "ncsnpp" else [])]
    settings = parse("", ModelConfig, DiffusionConfig, DataConfig, TrainConfig, RunConfig, argv=argv)
    assert recipe.items() <= settings.values.items() and settings.values["arch"] == arch
    numbers = 3 * settings.values["image_size"] ** 2                # over which EDM's loss is a sum, and ours a mean
    assert settings.values["adam_eps"] * numbers == pytest.approx(1e-8, rel=2e-3)
    with th.device("meta"):
        model = model_from(settings)
    assert round(sum(param.numel() for param in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name, evaluations", [("cifar10", 35), ("64", 79), ("imagenet64", 511)])
def test_published_samplers(name, evaluations):
    argv = ["--config", str(CONFIGS / f"sample_{name}.yaml")]
    settings = parse("", SampleConfig, SolverConfig, PngConfig, ModelConfig, DiffusionConfig, RunConfig, argv=argv)
    values = settings.values
    solver, _ = sampler_of(settings)
    result = sample(
        KarrasDenoiser(loss_norm="l2"), lambda x, t: 0 * x, (1, 3, 2, 2),
        SampleOptions(
            values["steps"], solver, clip_denoised=values["clip_denoised"],
            churn=Churn(**{key: values[key] for key in ("s_churn", "s_tmin", "s_tmax", "s_noise")}),
        ),
        device="cpu",
    )
    assert result.evaluations == evaluations
    assert (values["clip_denoised"], values["rounding"]) == (False, "nearest")
    churn = {"imagenet64": (40, 0.05, 50, 1.003)}.get(name, (0, 0, float("inf"), 1))
    assert tuple(values[key] for key in ("s_churn", "s_tmin", "s_tmax", "s_noise")) == churn


def test_every_preset_is_tested():
    bases = {"song", "song64"}
    samplers = {f"sample_{name}" for name in ("cifar10", "64", "imagenet64")}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {name for name, _ in TRAINING} | bases | samplers
