"""Flags: their table, their sources and their order, and every kind of bad input."""

import json
from pathlib import Path

import pytest

from cm.config import schema
from cm.config.flags import parse
from cm.config.schema import (
    SAMPLER_NAMES,
    ConsistencyConfig,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    PngConfig,
    RunConfig,
    SampleConfig,
    SeedsConfig,
    TernarySearchConfig,
    TrainConfig,
)
from cm.errors import UserError

DATA = Path(__file__).parents[1] / "data"
COMMON = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig, EvalConfig, RunConfig)
EDM = (*COMMON, ObjectiveConfig)
CM = (*COMMON, ConsistencyConfig)
SAMPLE = (SampleConfig, SeedsConfig, ModelConfig, DiffusionConfig, RunConfig)
SEARCH = (TernarySearchConfig, *SAMPLE)

# (script, flag): why its default is not the original's.
CHANGED = {
    ("edm_train.py", "schedule_sampler"): "uniform drew indices as noise levels and crashed; lognormal is EDM's law",
}


def settings_of(script, argv=()):
    return {
        "edm_train.py": lambda: parse("", *EDM, argv=argv),
        "cm_train.py": lambda: parse("", *CM, argv=argv, schedule_sampler="uniform", total_training_steps=600_000),
        "image_sample.py": lambda: parse("", *SAMPLE, argv=argv, seed=42),
        "ternary_search.py": lambda: parse(
            "", *SEARCH, argv=argv, training_mode="consistency_distillation", seed=42
        ),
    }[script]()


@pytest.mark.parametrize("script", ["edm_train.py", "cm_train.py", "image_sample.py", "ternary_search.py"])
def test_every_flag_of_the_original_is_there_with_its_default(script):
    ours = settings_of(script).values
    for flag, default in json.loads((DATA / "cli_flags.json").read_text())[script].items():
        name = flag.removeprefix("--")
        assert name in ours, f"{script} lost {flag}"
        if (script, name) not in CHANGED:
            assert ours[name] == (float("inf") if default == "inf" else default), flag


def test_edm_training_draws_from_edms_law_by_default():
    assert settings_of("edm_train.py").values["schedule_sampler"] == "lognormal"


def test_choices_are_the_tables():
    from cm.diffusion.noise_sampling import SCHEDULE_SAMPLERS
    from cm.diffusion.preconditioning import PRECONDS
    from cm.diffusion.weightings import WEIGHTINGS
    from cm.objectives import DENOISING, OBJECTIVES
    from cm.objectives.cdm import BACKWARD
    from cm.objectives.curricula import EMA_MODES, SCALE_MODES
    from cm.objectives.distances import DISTANCES
    from cm.random_util import GENERATORS
    from cm.samplers import SAMPLERS
    from cm.training.optimizer import OPTIMIZERS

    def choices(section, name):
        return set(section.__dataclass_fields__[name].metadata["choices"])

    assert set(SAMPLER_NAMES) == set(SAMPLERS)
    assert set(schema.TRAINING_MODES) == set(OBJECTIVES)
    assert set(schema.OBJECTIVE_NAMES) == choices(ObjectiveConfig, "objective") == set(DENOISING)
    assert choices(ObjectiveConfig, "martingale_sde") == set(BACKWARD)
    assert choices(DiffusionConfig, "weight_schedule") == set(WEIGHTINGS)
    assert choices(DiffusionConfig, "precond") == set(PRECONDS) - {"consistency"}       # which distillation chooses
    assert choices(TrainConfig, "schedule_sampler") == set(SCHEDULE_SAMPLERS)
    assert choices(TrainConfig, "optimizer") == set(OPTIMIZERS)
    assert choices(ConsistencyConfig, "loss_norm") == set(DISTANCES)
    assert choices(ConsistencyConfig, "target_ema_mode") == set(EMA_MODES)
    assert choices(ConsistencyConfig, "scale_mode") == set(SCALE_MODES)
    assert choices(SampleConfig, "generator") == set(GENERATORS)


def test_command_line_wins_over_file_over_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 3e-4\nimage_size: 32\nclass_cond: yes\nattention_resolutions: [16, 8]\n")
    values = parse("", *EDM, argv=["--config", str(file), "--image_size", "16"]).values
    assert (values["lr"], values["image_size"], values["class_cond"], values["num_channels"]) == (3e-4, 16, True, 128)
    assert values["attention_resolutions"] == "16,8"


def test_a_file_builds_on_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "network.yaml").write_text("image_size: 32\nnum_channels: 64\n")
    (tmp_path / "common.yaml").write_text("base: network.yaml\nlr: 1e-3\ndropout: 0.1\n")
    file = tmp_path / "sub" / "run.yaml"
    file.write_text("base: ../common.yaml\ndropout: 0.2\n")
    values = parse("", *EDM, argv=["--config", str(file), "--num_channels", "96"]).values
    assert [values[name] for name in ("image_size", "lr", "dropout", "num_channels")] == [32, 1e-3, 0.2, 96]
    (tmp_path / "network.yaml").write_text("base: common.yaml\n")
    with pytest.raises(UserError, match="builds on this file in turn"):
        parse("", *EDM, argv=["--config", str(file)])
    file.write_text("base: nowhere.yaml\n")
    with pytest.raises(UserError, match="nowhere.yaml: No such file"):
        parse("", *EDM, argv=["--config", str(file)])


def test_resolved_settings_are_a_config_file(tmp_path):
    first = parse("", *SAMPLE, argv=["--sampler", "onestep", "--class_cond", "True"], seed=42)
    file = tmp_path / "again.json"
    file.write_text(first.as_text())
    assert parse("", *SAMPLE, argv=["--config", str(file)], seed=42).values == first.values


@pytest.mark.parametrize("word, value", [("yes", True), ("T", True), ("1", True), ("No", False), ("0", False)])
def test_booleans(word, value):
    assert parse("", *EDM, argv=["--class_cond", word]).values["class_cond"] is value


@pytest.mark.parametrize("argv, words", [
    (["--num_chanels", "64"], ["--num_chanels", "Did you mean --num_channels"]),
    (["--lr_an", "1"], ["--lr_an"]),                        # no abbreviations
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--class_cond", "maybe"], ["maybe", "True or False"]),
])
def test_wrong_flags_exit_with_2(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("", *EDM, argv=argv)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


@pytest.mark.parametrize("argv, message", [
    (["--weight_schedule", "carras"], "weight_schedule='carras' is not one of: karras.*Did you mean 'karras'"),
    (["--image_size", "0"], "image_size=0 is too small; the least is 1"),
    (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
])
def test_wrong_values(argv, message):
    with pytest.raises(UserError, match=message):
        parse("", *EDM, argv=argv)


@pytest.mark.parametrize("text, message", [
    ("lernrate: 1\n", "'lernrate' is no flag of this script"),
    ("lrr: 1\n", "did you mean 'lr'"),
    ("lr: [1\n", "neither YAML nor JSON"),
    ("- 1\n- 2\n", "`flag: value` lines, not a list"),
    ("image_size: big\n", "image_size='big' is not a int"),
    ("!!python/object/apply:os.system [true]\n", "neither YAML nor JSON"),
])
def test_wrong_config_files(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        parse("", *EDM, argv=["--config", str(file)])


def test_only_rank_0_speaks(monkeypatch, capsys):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        parse("", *EDM, argv=["--nonsense"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""


def test_help_says_a_sentence_for_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("Train.", *CM, argv=["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for section in CM:
        for name, field in section.__dataclass_fields__.items():
            assert f"--{name}" in text
            assert len(field.metadata["help"].split()) >= 1


def test_a_checkpoint_fills_what_was_not_asked_for_and_contradictions_name_both():
    settings = parse("", *SAMPLE, argv=["--num_channels", "32"], seed=42)
    settings.inherit({"num_channels": 32, "image_size": 8, "unknown": 1}, "ema.pt")
    assert settings.values["image_size"] == 8
    with pytest.raises(UserError, match="--num_channels asks for num_channels=32, but ema.pt was made with .*=64"):
        settings.inherit({"num_channels": 64}, "ema.pt")


def test_a_flag_by_its_other_name(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lamda: 0.5\n")
    by_flag = parse("", *EDM, argv=["--config", str(file), "--lamda", "0.7"])
    assert by_flag.values["sa_lambda"] == 0.7 and str(by_flag.given["sa_lambda"]) == "--lamda"
    assert "lamda" not in by_flag.values
    assert parse("", *EDM, argv=["--config", str(file)]).values["sa_lambda"] == 0.5
    assert parse("", *EDM, argv=["--lamda", "0.3", "--sa_lambda", "0.3"]).values["sa_lambda"] == 0.3
    with pytest.raises(UserError, match="--lamda and --sa_lambda are one flag.*0.3 and 0.4"):
        parse("", *EDM, argv=["--lamda", "0.3", "--sa_lambda", "0.4"])
    file.write_text("sa_lambda: 0.5\nlamda: 0.6\n")
    with pytest.raises(UserError, match="run.yaml: --sa_lambda and --lamda"):
        parse("", *EDM, argv=["--config", str(file)])


def test_help_names_the_other_name_once(capsys):
    with pytest.raises(SystemExit):
        parse("Train.", *EDM, argv=["--help"])
    assert capsys.readouterr().out.count("--sa_lambda") == 1


def test_a_boolean_flag_alone_is_true():
    values = parse("", *SAMPLE, PngConfig, argv=["--subdirs", "--class_cond", "--seeds", "0-3"]).values
    assert values["subdirs"] is True and values["class_cond"] is True and values["seeds"] == "0-3"
    assert parse("", PngConfig, argv=["--subdirs", "False"]).values["subdirs"] is False
