"""The examples of docs/extending.md, run as they stand in the page."""

import csv
import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch as th

from cm.config import plugins
from cm.config.flags import parse
from cm.config.sampling_schema import SampleConfig, SolverConfig
from cm.config.schema import TRAINING_SECTIONS
from cm.distributed import launchers
from cm.errors import UserError
from support.mpi import ROOT
from support.page_commands import forget_plugins
from support.warm import python

PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
FILES = {text.splitlines()[0].removeprefix("# "): text for kind, text in BLOCKS if kind in ("python", "yaml")}
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which every command of the page was run."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "commands.json").write_text(json.dumps(COMMANDS))
    done = python([ROOT / "tests/support/page_commands.py", "commands.json"], cwd=folder)
    assert done.rc == 0 and done.stdout.count("\n$ ") == len(COMMANDS) - 1, done
    return folder


def test_every_example_is_complete_short_and_has_a_command():
    assert len(FILES) == 10
    for name, text in FILES.items():
        assert len(text.splitlines()) <= 40, f"{name} has {len(text.splitlines())} lines"
        users = [line for line in COMMANDS if name in line]
        assert users and all(f"--plugin {name}" in line for line in users if name.endswith(".py") and "-c" not in line)


@pytest.mark.parametrize("run", ["huber", "mixer", "raw", "log", "batchd"])
def test_the_commands_train(folder, run):
    with open(folder / "runs" / run / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"] and all(float(row["loss"]) > 0 for row in rows)


def test_the_names_reach_config_weights_and_log(folder):
    config = json.loads((folder / "runs/huber/config.json").read_text())
    assert (config["objective"], config["huber_delta"]) == ("huber", 0.1) and "plugin" not in config
    assert json.loads((folder / "runs/mixer/checkpoint_000002.json").read_text())["config"]["arch"] == "mixer"
    assert sorted(th.load(folder / "runs/mixer/model000002.pt")) == [
        "classes.weight", "first.bias", "first.weight", "last.bias", "last.weight", "noise.bias", "noise.weight"
    ]
    rows = (folder / "runs/log/rows.md").read_text().splitlines()
    assert rows[:2] == ["| step | loss |", "|---|---|"] and rows[3].startswith("| 2 | ") and rows[-1] == "finished"


def test_samples_and_their_evaluation(folder):
    drawn = [np.load(folder / "runs" / run / "samples_4x8x8x3.npz")["arr_0"] for run in ("npz", "midpoint")]
    assert (folder / "runs/mixed/samples_4x8x8x3.npz").exists(), "a network of one's own is sampled, too"
    about = json.loads((folder / "runs/midpoint/samples_4x8x8x3.json").read_text())
    assert (about["sampler"], about["network_evaluations"]) == ("midpoint", 5), "two a step, one for the last"
    means = [images.astype(np.float32).reshape(4, -1, 3) / 255 for images in drawn]
    features = [np.concatenate([x.mean(1), x.std(1)], axis=1).astype(np.float64).mean(0) for x in means]
    found = json.loads((folder / "distance.json").read_text())["metrics"]["mean_distance"]
    assert found["value"] == pytest.approx(np.linalg.norm(features[0] - features[1]), rel=1e-5) and found["value"] > 0


@pytest.fixture
def loaded(folder):
    """Loads files of the page into this process, for one test."""
    yield lambda name: plugins.load(str(folder / name))
    forget_plugins()


def test_the_midpoint_rule_is_of_second_order(loaded):
    """D(x) = x s^2 / (s^2 + sigma^2) of N(0, s^2): x goes with sqrt(s^2 + sigma^2)."""
    loaded("midpoint.py")
    from cm.samplers import SAMPLERS

    def error(steps):
        sigmas = th.logspace(1, -1, steps + 1, dtype=th.float64)
        x = th.full((1, 1), (0.25 + 100) ** 0.5, dtype=th.float64)
        for now, then in zip(sigmas, sigmas[1:]):
            x = SAMPLERS["midpoint"]().step(
                lambda x, sigma: x * (0.25 / (0.25 + sigma[:, None] ** 2)), x, now[None], then[None], None
            )
        return abs(x.item() - (0.25 + 0.01) ** 0.5)

    assert np.log2(error(64) / error(128)) == pytest.approx(2, abs=0.2)


def test_a_launcher_says_who_a_process_is(loaded):
    loaded("batch_system.py")
    env = {"BATCHD_JOB": "7", "BATCHD_RANK": "2", "BATCHD_SIZE": "4", "PMI_RANK": "0", "PMI_SIZE": "1"}
    assert launchers.announcements(env)[0] == launchers.Launch("batchd", 2, 4, False)
    assert launchers.launcher_rank(env) == 2
    with pytest.raises(UserError, match="BATCHD_RANK='4' must be less than BATCHD_SIZE='4'"):
        launchers.check({**env, "BATCHD_RANK": "4"})


def test_a_name_exists_only_with_its_plugin_and_only_once(folder, loaded, tmp_path):
    argv = ["--sampler", "midpoint"]
    with pytest.raises(UserError, match="sampler='midpoint' is not one of.*--plugin FILE may add others"):
        parse("", SampleConfig, argv=argv)
    for _ in range(2):                                      # commands parse their flags twice
        assert parse("", SampleConfig, argv=[*argv, "--plugin", str(folder / "midpoint.py")]).values["sampler"]
    copy = tmp_path / "copy.py"
    copy.write_text(FILES["midpoint.py"])
    with pytest.raises(UserError, match="copy.py, line 22: UserError: the sampler 'midpoint' already exists"):
        plugins.load(str(copy))


def test_fields_take_existing_flags(loaded, capsys):
    """`eta` and `sa_lambda` are flags, `width` is not."""
    loaded("midpoint.py")
    loaded("huber.py")
    from cm.diffusion.denoiser import Diffusion
    from cm.objectives import DENOISING
    from cm.samplers import SAMPLERS, make_sampler

    fields = {"__annotations__": {"eta": float, "width": float}, "eta": 0.0, "width": 3.0}
    SAMPLERS.register("wide", dataclass(frozen=True)(type("Wide", (SAMPLERS["midpoint"],), fields)))
    fields = {"__annotations__": {"sa_lambda": float}, "sa_lambda": 0.0, "options": ("sa_lambda",)}
    DENOISING.register("sequence", dataclass(type("Sequence", (DENOISING["huber"],), fields)))
    settings = parse("", SampleConfig, SolverConfig, argv=["--sampler", "wide", "--eta", "0.5"])
    sampler = make_sampler("wide", settings.values)
    assert (sampler.eta, sampler.width) == (0.5, 3.0)
    objective = DENOISING["sequence"].from_flags(Diffusion(), {"schedule_sampler": "lognormal", "sa_lambda": 0.7})
    assert (objective.sa_lambda, objective.huber_delta) == (0.7, 0.03)
    with pytest.raises(SystemExit):
        parse("", SampleConfig, SolverConfig, argv=["--sampler", "wide", "--width", "2"])
    assert "unrecognized arguments: --width 2" in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ("import numpy\n1 / 0\n", "bad.py, line 2: ZeroDivisionError: division by zero"),
    ("x = (\n", "bad.py, line 1: SyntaxError: '.' was never closed"),
    ("import no_such_module\n", "bad.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    (None, "bad.py: no such file"),
])
def test_a_plugin_that_fails_is_one_line_that_says_where(tmp_path, text, message):
    if text is not None:
        (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=message):
        parse("", SampleConfig, argv=["--plugin", str(tmp_path / "bad.py")])


def test_no_config_file_can_name_a_plugin(folder, tmp_path):
    (tmp_path / "run.yaml").write_text(f"plugin: {folder / 'midpoint.py'}\n")
    with pytest.raises(UserError, match="plugin.* is not a flag of this script"):
        parse("", SampleConfig, argv=["--config", str(tmp_path / "run.yaml")])


def test_a_config_of_a_plugins_flags_asks_for_the_plugin(folder):
    config = ["--config", str(folder / "runs/huber/config.json")]
    with pytest.raises(UserError, match="'huber_delta' is not a flag.*A flag of a plugin needs its --plugin"):
        parse("", *TRAINING_SECTIONS, argv=config)
    try:
        settings = parse("", *TRAINING_SECTIONS, argv=[*config, "--plugin", str(folder / "huber.py")])
        assert settings.values["huber_delta"] == 0.1
    finally:
        forget_plugins()
