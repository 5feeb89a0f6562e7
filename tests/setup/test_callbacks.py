"""Flags of what looks at a run: which make sense, and what they draw with."""

import pytest

from cm.config.flags import parse
from cm.config.schema import DataConfig, DiffusionConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig, VaeConfig
from cm.errors import UserError
from cm.setup.callbacks import check_flags, sampling_settings


def flags(*argv):
    sections = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig, EvalConfig, VaeConfig, RunConfig)
    settings = parse("", *sections, argv=[str(word) for word in argv])
    settings.replace(training_mode="edm")
    return settings


@pytest.mark.parametrize("argv, message", [
    (["--eval_interval", 5], "--eval_interval 5 needs --eval_ref"),
    (["--sample_interval", 5, "--eval_ema_rate", "0.99"], "--eval_ema_rate '0.99' is none of --ema_rate 0.9999"),
    (["--sample_interval", 5, "--eval_sampler", "multistep"], "--eval_ts"),
    (["--sample_interval", 5, "--eval_sampler", "multistep", "--eval_ts", "0,50"], "50"),
    (["--sample_interval", 5, "--ema_rate", ""], "none of --ema_rate"),
])
def test_flags_that_make_no_sense_are_errors(argv, message):
    with pytest.raises(UserError, match=message):
        check_flags(flags(*argv))


@pytest.mark.parametrize("mode, sampler", [
    ("edm", "heun"), ("consistency_distillation", "onestep"), ("consistency_training", "onestep"),
    ("progdist", "progdist"),
])
def test_the_sampler_follows_the_training_mode(mode, sampler):
    settings = flags("--eval_steps", 7)
    settings.replace(training_mode=mode)
    drawing = sampling_settings(settings).values
    assert (drawing["sampler"], drawing["steps"], drawing["seed"]) == (sampler, 7, 42)


def test_a_network_on_ddpms_timesteps_is_watched_from_its_last_one_as_it_is_sampled():
    settings = flags("--precond", "ddpm", "--sample_interval", 5)
    assert sampling_settings(settings).values["sigma_max"] == pytest.approx(157.4, abs=0.1)
    assert settings.values["sigma_max"] == 80                   # what the loss is reported at
