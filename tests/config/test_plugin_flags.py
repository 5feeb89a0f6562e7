"""Flags that a plugin's objective or sampler brings along."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from cm.config.flags import give, option, parse, resolve
from cm.config.plugin_flags import registered_sections, with_registered
from cm.config.sampling_schema import SampleConfig, SolverConfig
from cm.config.schema import TRAINING_SECTIONS
from cm.diffusion.denoiser import Diffusion
from cm.errors import UserError
from cm.logging import FORMATS
from cm.objectives import DENOISING
from cm.objectives.edm import EDM
from cm.pipeline.training import training_settings
from cm.samplers import SAMPLERS
from cm.setup.callbacks import sampling_settings
from cm.setup.objective import apply_objective_defaults
from cm.setup.run_facts import training_command
from cm.setup.sampler import sampler_of

SAMPLING = (SampleConfig, SolverConfig)
NETWORK = {"sigma_min": 0.002, "sigma_max": 80.0, "second_time": False, "compile": False}


@dataclass(frozen=True)
class SlopeFlags:
    """slope"""

    slope: float = option(2.0, "slope: how steep", minimum=0, aliases=("steepness",))


@dataclass
class Slope(EDM):
    options = ("slope",)
    slope: float = 2.0


@dataclass(frozen=True)
class WaveFlags:
    """wave"""

    width: float = option(3.0, "wave: its width")


@dataclass(frozen=True)
class Wave(SAMPLERS["euler"]):
    width: float = 1.0


@pytest.fixture(autouse=True)
def register():
    """Registers components of one test."""
    found = []

    def add(table, name, entry, flags):
        table.register(name, entry, flags=flags)
        found.append((table, name))

    yield add
    for table, name in found:
        table.unregister(name)


def test_training_has_the_flags_of_an_objective(register, tmp_path):
    with pytest.raises(SystemExit):
        parse("", *TRAINING_SECTIONS, argv=["--slope", "3"])
    register(DENOISING, "slope", Slope, SlopeFlags)
    for words in (["--slope", "3"], ["--steepness=3"]):
        assert parse("", *TRAINING_SECTIONS, argv=["--objective", "slope", *words]).values["slope"] == 3
    (tmp_path / "run.yaml").write_text("objective: slope\nslope: 5\n")
    settings = parse("", *TRAINING_SECTIONS, argv=["--config", str(tmp_path / "run.yaml")], training_mode="edm")
    apply_objective_defaults(settings)
    assert DENOISING["slope"].from_flags(Diffusion(), settings.values).slope == 5
    assert json.loads(settings.as_text())["slope"] == 5
    assert resolve({"objective": "slope"}, *TRAINING_SECTIONS).values["slope"] == 2
    with pytest.raises(UserError, match="slope=-1.0 is too small; the least is 0"):
        parse("", *TRAINING_SECTIONS, argv=["--slope", "-1"])
    for other in (SAMPLING, (SolverConfig,)):
        assert with_registered(other) == other, "commands that choose no objective"


def test_a_program_that_has_imported_them_may_name_them(register):
    register(DENOISING, "slope", Slope, SlopeFlags)
    flags = {"log_dir": "runs/x", "training_mode": "edm", "objective": "slope", "slope": 4}
    assert training_settings(flags).values["slope"] == 4


def test_another_objective_refuses_them(register):
    register(DENOISING, "slope", Slope, SlopeFlags)
    settings = parse("", *TRAINING_SECTIONS, argv=["--steepness", "3"], training_mode="edm")
    with pytest.raises(UserError, match="--steepness: slope=3.0 is for --objective slope, but this run has --objective "
                                        "edm, which does not use it"):
        apply_objective_defaults(settings)


def test_the_command_of_a_run_has_them(register):
    register(DENOISING, "slope", Slope, SlopeFlags)
    config = {"training_mode": "edm", "objective": "slope", "data_dir": "digits", "slope": 7.0}
    assert training_command(config).endswith("--objective slope --data_dir digits --slope 7.0")


def test_sampling_has_the_flags_of_a_sampler(register):
    register(SAMPLERS, "wave", Wave, WaveFlags)
    settings = parse("", *SAMPLING, argv=["--sampler", "wave", "--width", "4"])
    settings.values |= NETWORK
    assert sampler_of(settings)[0].width == 4
    settings = parse("", *SAMPLING, argv=["--sampler", "wave"])
    settings.values |= NETWORK
    assert sampler_of(settings)[0].width == 3, "the flag's default goes before the field's"
    settings = parse("", *SAMPLING, argv=["--sampler", "heun", "--width", "4"])
    settings.values |= NETWORK
    with pytest.raises(UserError, match="--width 4.0 belongs to --sampler wave, not to heun"):
        sampler_of(settings)
    assert "width" not in parse("", *TRAINING_SECTIONS, argv=[]).values


def test_samples_during_training_take_the_default(register):
    register(SAMPLERS, "wave", Wave, WaveFlags)
    for sampler, width in ({"wave": 3, "heun": None}).items():
        settings = parse("", *TRAINING_SECTIONS, argv=["--eval_sampler", sampler], training_mode="edm")
        assert getattr(sampler_of(sampling_settings(settings))[0], "width", None) == width


def test_settings_that_were_there_before_know_them(register):
    settings = resolve({"sampler": "heun"}, *SAMPLING)
    register(SAMPLERS, "wave", Wave, WaveFlags)
    give(settings, {"sampler": "wave"}, *SAMPLING)
    assert settings.values["width"] == 3


def test_two_components_may_share_a_section(register):
    register(SAMPLERS, "wave", Wave, WaveFlags)
    register(SAMPLERS, "wave2", Wave, WaveFlags)
    assert registered_sections("sampler") == [WaveFlags]
    assert with_registered(SAMPLING) == (*SAMPLING, WaveFlags)


def flags_with(**fields):
    return dataclasses.make_dataclass("Flags", [(name, float, each) for name, each in fields.items()], frozen=True)


@pytest.mark.parametrize("fields, message", [
    ({"slope": option(1.0, "one"), "lr": option(1.0, "two")}, "lr would have no effect: its `options` must list it"),
    ({"slope": dataclasses.field(default=1.0)}, "make them fields of a frozen dataclass, each by .*option"),
    ({}, "make them fields of a frozen dataclass"),
])
def test_wrong_sections_are_refused(register, fields, message):
    register(DENOISING, "slope", Slope, flags_with(**fields))
    with pytest.raises(UserError, match=f"the flags of the objective 'slope': {message}"):
        parse("", *TRAINING_SECTIONS, argv=[])


def test_a_flag_that_exists_is_refused(register):
    @dataclass(frozen=True)
    class Twice(SAMPLERS["euler"]):
        eta: float = 1.0

    register(SAMPLERS, "wave", Twice, flags_with(eta=option(1.0, "eta")))
    with pytest.raises(UserError, match="the sampler 'wave' adds the flag --eta, which exists already: choose another"):
        parse("", *SAMPLING, argv=[])


def test_a_sampler_without_the_field_is_refused(register):
    register(SAMPLERS, "wave", Wave, flags_with(height=option(1.0, "height")))
    with pytest.raises(UserError, match="height would have no effect: it needs a field of that name"):
        parse("", *SAMPLING, argv=[])


def test_other_tables_have_no_flags():
    with pytest.raises(UserError, match="the log format 'mine' cannot add flags: only these can: objective, .*sampler"):
        FORMATS.register("mine", FORMATS["csv"], flags=WaveFlags)
    assert "mine" not in FORMATS
