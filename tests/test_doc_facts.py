"""Small facts that the pages state of other files: names, numbers and commands are those that are there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cm.config.flags import parse
from cm.config.objective_schema import FewStepConfig, ObjectiveConfig
from cm.config.sampling_schema import SolverConfig
from cm.config.schema import TRAINING_SECTIONS, DataConfig, DiffusionConfig, EvalConfig, TrainConfig, VaeConfig
from cm.diffusion.schedules import karras_grid
from cm.samplers import SAMPLERS
from evaluations.engine.statistics_cache import KEPT

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def commands_of_the_project() -> set[str]:
    table = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = ", table, re.MULTILINE))


def test_every_command_of_the_page_is_installed():
    listed = text("README.md").split("gives the commands ")[1].split(" in any folder")[0]
    assert set(re.findall(r"`(cm-[a-z]+)`", listed)) == commands_of_the_project()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make, which README.md asks for")
def test_what_make_runs():
    def plan(*words: str) -> str:
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}    # of `make test`
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert plan("demo-clean").strip() == "rm -rf runs/demo"
    assert "scripts/demo.py --out runs/demo" in plan("demo")
    assert "scripts/demo.py --ranks 4 --out runs/demo" in plan("demo", "RANKS=4")
    words = "scripts/quickstart.py --data_dir \"my photos\" --hours 2 --out runs/quickstart"
    assert words in plan("demo", "DATA=my photos") and "--hours 0.5 " in plan("demo", "DATA=digits", "HOURS=0.5")
    assert "--require-hashes --requirement requirements.lock" in plan("-B", "install", "LOCKED=1")
    suite = plan("test")
    assert suite.index("/pyright ") < suite.index("ruff check .") < suite.index("-m pytest")
    assert re.search(r"-m pytest -n 4 --dist loadfile --durations 10$", suite, re.MULTILINE)
    assert "pytest -m slow -rs tests/system/test_slurm.py" in plan("slurm")
    assert "pytest -m cuda -rs --on cuda" in plan("test-gpu") and "--on cpu" in plan("test-gpu", "ON=cpu")
    assert "soak.py --minutes 10" in plan("soak") and "pytest -m slow" in plan("test-slow")
    assert (ROOT / ".ci/run").read_text().endswith("make browser\nmake test\n")


@pytest.mark.parametrize("page, words, value", [
    ("docs/runs.md", "`--grace_seconds` ({:g})", TrainConfig.grace_seconds),
    ("docs/multi-node.md", "`--timeout_seconds` ({:g})", TrainConfig.timeout_seconds),
    ("docs/reports.md", "how many images are generated for it ({})", EvalConfig.eval_samples),
    ("docs/reports.md", "images per rank and forward pass ({})", EvalConfig.eval_batch_size),
    ("docs/reports.md", "| `--eval_seed` | {}, the default", EvalConfig.eval_seed),
    ("docs/training.md", "`--ema_rampup_ratio` sets the factor {}", TrainConfig.ema_rampup_ratio),
    ("docs/samplers.md", "with `--rho` ({:g})", SolverConfig.rho),
    ("docs/samplers.md", "sampled from {:g} to", DiffusionConfig.sigma_max),
    ("docs/methods.md", "`--num_references {}`", ObjectiveConfig.num_references),
    ("docs/methods.md", "`--martingale_lambda {:g}", ObjectiveConfig.martingale_lambda),
    ("docs/methods.md", "--sa_lambda {}`", ObjectiveConfig.sa_lambda),
    ("docs/few-step.md", "`ect` has `--stages {}`", FewStepConfig.stages),
    ("docs/few-step.md", "c is {} (`--tangent_c`)", FewStepConfig.tangent_c),
    ("datasets/README.md", "into `--cache_gib` per rank, {} by default", DataConfig.cache_gib),
    ("datasets/README.md", "of them at a time ({})", DataConfig.shuffle_window),
    ("docs/latents.md", "`--vae_batch_size` latents ({}) are decoded", VaeConfig.vae_batch_size),
    ("docs/evaluation.md", "the {} most recently used", KEPT),
])
def test_defaults_that_pages_state(page, words, value):
    assert words.format(value) in text(page)


@pytest.mark.parametrize("page, pattern", [
    ("docs/training.md", r"`--(?P<other>\w+)` for `--(?P<name>\w+)`"),
    ("CHANGELOG.md", r"`--(?P<name>\w+)` \(`--(?P<other>\w+)`\)"),
])
def test_other_names_of_flags(page, pattern):
    pairs = {found["other"]: found["name"] for found in re.finditer(pattern, text(page))}
    assert sorted(pairs) == ["dump", "lamda", "plan_ranks", "rbatch", "snap", "tick"]
    for other, name in pairs.items():
        assert parse("", *TRAINING_SECTIONS, argv=[f"--{other}", "7"]).values[name] == 7


def test_every_sampler_has_a_row():
    first = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs/samplers.md").read_text(), re.MULTILINE)
    assert {name for cell in first for name in re.findall(r"`(\w+)`", cell)} - {"--sampler"} == set(SAMPLERS)


def test_the_second_level_of_two_steps():
    assert f"index 24 is sigma {karras_grid(40, 0.002, 80.0, 7.0)[24]:.2f}" in text("docs/few-step.md")


def test_every_folder_of_presets_has_a_row():
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "configs/README.md").read_text(), re.MULTILINE)
    folders = [path.name for path in (ROOT / "configs").iterdir() if path.is_dir()]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)/`", row)) == sorted(folders)
