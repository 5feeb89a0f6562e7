"""Flags: their table, their sources and their order, and every kind of bad input."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from cm.config import objective_schema, schema
from cm.config.flags import parse
from cm.config.objective_schema import ConsistencyConfig, FewStepConfig, ObjectiveConfig
from cm.config.sampling_schema import PngConfig, SampleConfig, SeedsConfig, TernarySearchConfig
from cm.config.schema import SAMPLER_NAMES, DataConfig, DiffusionConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
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
    ("image_sample.py", "sampler"): "heun blurs the images of consistency models; the default follows the checkpoint",
    ("ternary_search.py", "sampler"): "that of image_sample.py",
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
    from cm.objectives.consistency import PAIR_WEIGHTS, TARGETS, LossParts
    from cm.objectives.curricula import EMA_MODES, SCALE_MODES
    from cm.objectives.distances import DISTANCES
    from cm.objectives.pairs import PAIRS
    from cm.objectives.paths import PATHS
    from cm.random_util import GENERATORS
    from cm.samplers import SAMPLERS
    from cm.training.optimizer import OPTIMIZERS

    def choices(section, name):
        return set(section.__dataclass_fields__[name].metadata["choices"])

    assert set(SAMPLER_NAMES) == set(SAMPLERS)
    assert set(objective_schema.TRAINING_MODES) == set(OBJECTIVES)
    assert set(objective_schema.OBJECTIVE_NAMES) == choices(ObjectiveConfig, "objective") == set(DENOISING)
    assert choices(ObjectiveConfig, "martingale_sde") == set(BACKWARD)
    assert choices(DiffusionConfig, "weight_schedule") == set(WEIGHTINGS)
    assert choices(DiffusionConfig, "precond") == set(PRECONDS) - {"consistency"}       # which distillation chooses
    assert choices(TrainConfig, "schedule_sampler") == set(SCHEDULE_SAMPLERS)
    assert choices(TrainConfig, "optimizer") == set(OPTIMIZERS)
    assert choices(ConsistencyConfig, "loss_norm") == set(DISTANCES)
    assert choices(ConsistencyConfig, "target_ema_mode") == set(EMA_MODES)
    assert choices(ConsistencyConfig, "scale_mode") == set(SCALE_MODES)
    words = {"pairs": PAIRS, "pair_path": PATHS, "pair_weight": PAIR_WEIGHTS, "pair_target": TARGETS}
    assert set(words) == {field.name for field in dataclasses.fields(LossParts)}
    for name, table in words.items():
        assert choices(FewStepConfig, name) == {"", *table}
    assert choices(SampleConfig, "generator") == set(GENERATORS)


def test_a_list_of_choices():
    assert parse("", RunConfig, argv=["--log_formats", "csv, json"]).values["log_formats"] == "csv, json"
    with pytest.raises(UserError, match="log_formats='jsn' is not one of: stdout, .*Did you mean 'json'"):
        parse("", RunConfig, argv=["--log_formats", "csv,jsn"])


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
    with pytest.raises(UserError, match="is in turn based on this file"):
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
    ("lernrate: 1\n", "'lernrate' is not a flag of this script"),
    ("lrr: 1\n", "Did you mean 'lr'"),
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
    with pytest.raises(UserError, match="--lamda and --sa_lambda are names of one flag.*0.3 and 0.4"):
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


@pytest.mark.parametrize("argv, message", [
    (["--lr", "nan"], "--lr: lr=nan is not a finite number"),
    (["--sigma_max", "inf"], "--sigma_max: sigma_max=inf is not a finite number"),
    (["--lr", "-1e-3"], "--lr: lr=-0.001 is too small; the least is 0"),
    (["--dropout", "1.5"], "dropout=1.5 is too large; it must be below 1"),
    (["--dropout", "1"], "dropout=1.0 is too large"),
    (["--augment", "1.2"], "augment=1.2 is too large; the largest is 1"),
    (["--seed", str(2**63)], f"seed={2**63} is too large; the largest is {2**63 - 1}"),
    (["--microbatch", "-2"], "microbatch=-2 is too small; the least is -1"),
    (["--timeout_seconds", "1e300"], "timeout_seconds=1e+300 is too large"),
    (["--global_batch_size", str(10**11)], "global_batch_size=100000000000 is too large"),
    (["--image_size", "1000000"], "image_size=1000000 is too large"),
    (["--sigma_max", "1e30"], "sigma_max=1e+30 is too large"),
    (["--sigma_min", "1e-30"], "sigma_min=1e-30 is too small"),
])
def test_impossible_numbers(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse("", *EDM, argv=argv)


def test_every_float_flag_refuses_what_is_no_number():
    sections = [kind for kind in vars(schema).values() if dataclasses.is_dataclass(kind)]
    floats = [(kind, field) for kind in sections for field in dataclasses.fields(kind) if field.type == "float"]
    assert len(floats) > 20
    for kind, field in floats:
        for value in ("nan", "-inf", *(() if field.metadata["infinite"] else ("inf",))):
            with pytest.raises(UserError, match=field.name):
                parse("", kind, argv=[f"--{field.name}", value])


def test_infinity_where_it_has_a_meaning():
    assert parse("", SampleConfig, argv=["--s_tmax", "inf"]).values["s_tmax"] == float("inf")


@pytest.mark.parametrize("text, message", [
    ("lr: 1e-4\nseed: 3\nlr: 1e-2\n", "line 3: lr is given twice, first in line 1"),
    ('{"lr": 1e-4,\n "lr": 1e-2}', "line 2: lr is given twice, first in line 1"),
    ("seed: 1\ncheckpoint_dir:\n", "line 2: checkpoint_dir has no value"),
    ('{"checkpoint_dir": null}', "line 1: checkpoint_dir has no value"),
    ("log_interval: true\n", "log_interval=True is not a int"),
    ("lr: false\n", "lr=False is not a float"),
    ("log_dir: yes\n", "log_dir=True is not a str"),
])
def test_config_files_that_mean_something_else_than_they_seem_to(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        parse("", *EDM, argv=["--config", str(file)])


@pytest.mark.parametrize("section, name", [
    (RunConfig, "log_dir"), (TrainConfig, "checkpoint_dir"), (TrainConfig, "resume"),
    (TrainConfig, "resume_checkpoint"),
    (DataConfig, "data_dir"), (EvalConfig, "eval_ref"), (ConsistencyConfig, "teacher_model_path"),
    (SampleConfig, "model_path"), (PngConfig, "outdir"),
])
def test_every_path_may_begin_with_the_home_folder(tmp_path, monkeypatch, section, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: ~/x\n")
    for argv in ([f"--{name}", "~/x"], [f"--{name}=~/x"], ["--config", "~/run.yaml"]):
        assert parse("", section, argv=argv).values[name] == f"{tmp_path}/x"


def test_a_flag_given_twice_is_refused(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("", *EDM, argv=["--lr", "1e-4", "--lr=1e-2"])
    assert leaving.value.code == 2 and "--lr is given 2 times; give it once" in capsys.readouterr().err


@pytest.mark.parametrize("sections, theirs, ours", [
    (SAMPLE, "--network", "--model_path"), (SAMPLE, "--class", "--class_label"), (EDM, "--cond", "--class_cond"),
    (EDM, "--fp16", "--use_fp16"), (EDM, "--batch", "--global_batch_size"), (EDM, "--stf", "--objective stf"),
    (EDM, "--transfer", "--resume_checkpoint"), (EDM, "--resolution", "--image_size"), (EDM, "--learning_rate", "--lr"),
    (EDM, "--learnin_rate", "--lr"), (EDM, "--max_train_step", "--total_training_steps"),
    (SAMPLE, "--n_samples", "--num_samples"),
])
def test_flags_of_other_tools_are_known(capsys, sections, theirs, ours):
    with pytest.raises(SystemExit):
        parse("", *sections, argv=[theirs, "1"])
    assert f"Did you mean {ours}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--ema_rate", "-5kimg"], ["--ema_rate=-5kimg"]])
def test_a_value_that_begins_with_a_dash_is_a_value(words):
    """argparse takes it for a flag, and says of the one before that it expects an argument."""
    assert parse("", TrainConfig, argv=words).values["ema_rate"] == "-5kimg"
    assert parse("", SampleConfig, argv=["--ts", "-1,39", "--steps", "40"]).values["ts"] == "-1,39"


def test_a_dash_is_no_value_where_a_flag_takes_none(capsys):
    for words, message in ((["--lr", "--seed", "1"], "--lr: expected one argument"),
                           (["-x"], "unrecognized arguments: -x"),
                           (["--class_cond", "-x"], "unrecognized arguments: -x")):
        with pytest.raises(SystemExit):
            parse("", *EDM, argv=words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("", *EDM, argv=["--lr", "-h"])                # which is help, as ever
