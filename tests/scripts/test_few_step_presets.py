"""The presets of the few-step methods: their flags are accepted, with the numbers of their papers."""

from pathlib import Path

import pytest

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.objectives import OBJECTIVES
from cm.setup.clock import FASTEST, clock_speed
from cm.setup.model import diffusion_from, drop_unreachable_attention, model_from
from cm.setup.objective import apply_objective_defaults

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = {
    "cifar10/ict": {"lr": 1e-4, "global_batch_size": 1024, "total_training_steps": 400_000, "dropout": 0.3,
                    "ema_rate": "0.99993", "start_scales": 10, "end_scales": 1280, "p_mean": -1.1, "p_std": 2.0},
    "cifar10/ect": {"lr": 1e-4, "global_batch_size": 128, "shrink_q": 2, "stages": 8, "dropout": 0.2,
                    "ema_rate": "0.9999", "p_mean": -1.1, "p_std": 2.0, "huber_c": 1e-8, "random_flip": False},
    "cifar10/ect_1h": {"random_flip": False, "total_training_steps": 8000, "shrink_q": 256, "stages": 1,
                       "ema_rate": "0.9993"},
    "imagenet64/ict": {"lr": 1e-4, "global_batch_size": 4096, "total_training_steps": 800_000, "dropout": 0.2,
                       "dropout_resolutions": "16,8", "ema_rate": "0.99997", "precision": "fp32", "tf32": True},
    "imagenet64/ect": {"p_mean": -0.8, "p_std": 1.6, "shrink_q": 4, "stages": 4, "pair_weight": "level",
                       "weight_schedule": "karras", "huber_c": 0.06, "global_batch_size": 128,
                       "total_training_steps": 100_000, "precision": "fp32", "tf32": True},
    "cifar10/scd": {"global_batch_size": 512, "total_training_steps": 500_000, "p_mean": -1.0, "p_std": 1.4,
                    "dropout": 0.0, "tangent_c": 0.1, "tangent_warmup": 10_000, "adam_beta2": 0.99,
                    "random_flip": False},
    "cifar10/sct": {"global_batch_size": 512, "total_training_steps": 350_000, "p_mean": -1.0, "p_std": 1.8,
                    "dropout": 0.2, "adam_beta2": 0.99, "random_flip": False},
    "imagenet64/scd": {"lr": 7e-5, "global_batch_size": 1024, "total_training_steps": 600_000, "p_std": 1.6,
                       "adam_beta2": 0.99, "adam_eps": 1e-11, "lr_decay_steps": 35_000, "grad_clip": 10},
    "digits/scd": {"tangent_warmup": 50},
    "cifar10/meanflow": {"lr": 6e-4, "global_batch_size": 1024, "total_training_steps": 800_000, "p_mean": -0.6,
                         "p_std": 1.6, "r_mean": -4.0, "r_std": 1.6, "equal_share": 0.25, "adapt_p": 0.75,
                         "adapt_e": 1e-3, "dropout": 0.2},
    "cifar10/alphaflow": {"alpha_end": 0.005},
    "digits/alphaflow": {"pair_path": "teacher", "adam_beta2": 0.95},
    "digits/ict": {"end_scales": 32},
    "digits/ect": {"stages": 4},
}
CD_AND_CT = {"consistency_distillation", "consistency_training"}


def resolved(name):
    argv = ["--config", str(CONFIGS / f"{name}.yaml")]
    settings = parse("", *TRAINING_SECTIONS, argv=argv, total_training_steps=600_000)
    drop_unreachable_attention(settings)
    apply_objective_defaults(settings)
    return settings


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_a_run_of_its_paper(name):
    settings = resolved(name)
    assert PUBLISHED[name].items() <= settings.values.items()
    kind = OBJECTIVES[settings.values["training_mode"]]
    objective = kind.from_flags(diffusion_from(settings, kind.distillation), settings.values)
    objective.check(settings.values["total_training_steps"])


@pytest.mark.parametrize("name", ["cifar10/ict", "imagenet64/ict", "digits/ict", "cifar10/meanflow"])
def test_those_without_a_teacher_have_a_network_with_a_slow_clock(name):
    settings = resolved(name)
    assert clock_speed(diffusion_from(settings, distillation=True), settings.values["arch"]) < FASTEST
    if name == "digits/ict":
        model_from(settings)


def test_every_preset_is_tested():
    few = {
        str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.yaml")
        for line in path.read_text().splitlines() if line.startswith("training_mode: ")
        and line.split()[1] in set(OBJECTIVES) - CD_AND_CT - {"edm", "progdist"}
    }
    assert few == set(PUBLISHED)
