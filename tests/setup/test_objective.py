"""Which flags an objective takes, what it brings along, and what becomes of those of the others."""

import contextlib
import dataclasses

import pytest

from cm.config import presets
from cm.config.flags import parse
from cm.config.objective_schema import ObjectiveConfig
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.objectives import DENOISING
from cm.setup.model import diffusion_from
from cm.setup.objective import (
    apply_objective_defaults,
    apply_precond_defaults,
    check_noise_levels,
    objective_kind,
)
from cm.setup.rules import refuse_idle_flags


def settings_of(*argv):
    settings = parse("", *TRAINING_SECTIONS, argv=argv, training_mode="edm")
    apply_objective_defaults(settings)
    apply_precond_defaults(settings)
    return settings


def objective_of(*argv):
    settings = settings_of(*argv)
    return objective_kind(settings.values).from_flags(diffusion_from(settings, distillation=False), settings.values)


@pytest.mark.parametrize("argv, expected", [
    (["--objective", "cdm"], {"martingale_lambda": 10, "martingale_steps": 6, "martingale_sde": "t"}),
    (["--objective", "cdm", "--martingale_lambda", "2", "--martingale_steps", "3", "--martingale_sde", "u"],
     {"martingale_lambda": 2, "martingale_steps": 3, "martingale_sde": "u"}),
    (["--objective", "stf", "--num_references", "64"], {"num_references": 64, "references": 64}),
    (["--objective", "sadpm"], {"num_consecutive_steps": 2, "sa_lambda": 0.2}),
    (["--objective", "sadpm", "--num_consecutive_steps", "4", "--sa_lambda", "1"],
     {"num_consecutive_steps": 4, "sa_lambda": 1.0}),
    ([], {"references": 0}),
])
def test_flags_arrive(argv, expected):
    objective = objective_of(*argv)
    assert type(objective) is DENOISING[argv[1] if argv else "edm"]
    assert {name: getattr(objective, name) for name in expected} == expected


def test_every_flag_belongs_to_an_objective():
    flags = {field.name for field in dataclasses.fields(ObjectiveConfig)} - {"objective"}
    assert set().union(*(kind.options for kind in DENOISING.values())) == flags


@pytest.mark.parametrize("argv, message", [
    (["--martingale_lambda", "10"], "--martingale_lambda: .*for --objective cdm.*has --objective edm"),
    (["--objective", "cdm", "--num_references", "64"], "--num_references: .*for --objective stf.*has --objective cdm"),
    (["--objective", "stf", "--sa_lambda", "1"], "--sa_lambda: sa_lambda=1.0 is for --objective sadpm"),
])
def test_flags_of_another_objective_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        settings_of(*argv)


def test_a_file_of_all_flags_may_name_those_that_nobody_changed(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(settings_of("--objective", "stf", "--num_references", "64").as_text())
    assert objective_of("--config", str(file)).num_references == 64
    with pytest.raises(UserError, match="config.json: num_references=64 is for --objective stf"):
        settings_of("--config", str(file), "--objective", "edm")


@pytest.mark.parametrize("words, message", [
    ("--training_mode ict --p_mean 1000", "--p_mean 1000 .* hardly any .*choose --p_mean from -12.2 to 10.4"),
    ("--training_mode ect --p_mean -1000", "--p_mean -1000 .* between --sigma_min 0.002 and --sigma_max 80"),
    ("--training_mode meanflow --r_mean 100", "--r_mean 100 "), ("--training_mode sct --p_std 9", "--p_std up to 5.3"),
    ("--objective uncertainty --noise_mean 1000", "--noise_mean 1000 is the mean of ln sigma"),
    ("--training_mode ict --p_mean=nan", "not a finite number"),
    ("--training_mode ict", ""), ("--training_mode ect --p_mean -3 --p_std 3", ""), ("--training_mode meanflow", ""),
    ("--objective uncertainty --noise_mean 1", ""), ("--training_mode scd --p_mean 1.5 --p_std 1.4", ""),
])
def test_noise_levels_that_no_network_knows_are_refused(words, message):
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_noise_levels(settings_of(*words.split()))


def test_the_sequence_aware_loss_brings_ddpm_along():
    def resolved(*argv):
        return [settings_of(*argv).values[name] for name in ("precond", "schedule_sampler", "weight_schedule")]

    assert resolved("--objective", "sadpm") == ["ddpm", "ddpm", "snr"]
    assert resolved("--objective", "sadpm", "--precond", "edm") == ["edm", "lognormal", "karras"]
    assert resolved("--objective", "stf") == ["edm", "lognormal", "karras"]


# --- every preconditioning on Gaussian data, where its own paper says what the best network answers ------------------


def test_the_published_law_and_weight_come_with_the_precond():
    def resolved(*argv):
        settings = parse("", *TRAINING_SECTIONS, argv=argv, training_mode="edm")
        apply_precond_defaults(settings)
        return settings.values["schedule_sampler"], settings.values["weight_schedule"]

    assert resolved() == ("lognormal", "karras")
    assert [resolved("--precond", name) for name in ("vp", "ve", "iddpm")] == [
        ("vp", "snr"), ("ve", "snr"), ("iddpm", "snr")
    ]
    assert resolved("--precond", "vp", "--schedule_sampler", "lognormal") == ("lognormal", "snr")


def test_levels_that_are_never_reached_are_told(capsys):
    """With --scale_mode fixed only --start_scales counts."""
    def told(*argv):
        settings_of("--training_mode", "consistency_distillation", *argv)
        return "".join(capsys.readouterr())

    assert "--end_scales 100 has no effect" in told("--end_scales", "100")
    for argv in ([], ["--end_scales", "40"], ["--end_scales", "100", "--scale_mode", "progressive"]):
        assert "has no effect" not in told(*argv)


def test_a_file_of_another_objective_is_told(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("training_mode: consistency_training\nloss_norm: l2\nhuber_c: 0.1\ntangent_c: 0.2\n")
    settings_of("--config", str(file))
    said = "".join(capsys.readouterr())
    assert said.count("\n") == 1 and f"{file} sets what has no effect in this run: " in said
    assert "huber_c 0.1 (needs --loss_norm pseudo-huber)" in said
    assert "tangent_c 0.2 (needs --training_mode scd or --training_mode sct)" in said


@pytest.mark.parametrize("preset", [name for name in presets.names() if "sample" not in name])
def test_presets_set_nothing_that_has_no_effect(preset, tmp_path, capsys):
    """Neither do the settings that a run records of itself."""
    file = tmp_path / "config.json"
    for source in (preset, str(file)):
        settings = settings_of("--config", source)
        refuse_idle_flags(settings)
        file.write_text(settings.as_text())
        assert "".join(capsys.readouterr()) == "", source
