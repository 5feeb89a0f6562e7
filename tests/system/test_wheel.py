"""The built wheel in an environment of its own, from an empty folder, without the repository: commands, presets, ranks.

The environment borrows the requirements of the one that runs the tests, whose own toolkit it cannot see: a .pth file
adds a folder to the path, but not what that folder's own .pth files add.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PathDistribution
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomllib

from support.mpi import ROOT, clean_environment, find_mpiexec

COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
TINY = ["--config", "digits/edm", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1",
        "--total_training_steps", "2", "--global_batch_size", "16", "--save_interval", "2", "--log_interval", "1"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the environment, and an empty one to work in."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder,
                    str(copy_of_the_tree(folder / "tree"))], check=True, env=clean_environment({"PYTHONPATH": None}))
    wheel, = folder.glob("*.whl")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env/bin/python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel],
                   check=True, env=clean_environment({"PYTHONPATH": None}))
    site, = (folder / "env/lib").glob("python*/site-packages")
    (site / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (folder / "empty").mkdir()
    return SimpleNamespace(bin=folder / "env/bin", site=site, work=folder / "empty")


def copy_of_the_tree(folder):
    """What the wheel is made of; building writes into the tree."""
    ignored = "--exclude-standard"
    files = subprocess.run(["git", "ls-files", "-co", ignored], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        if name.split("/")[0] not in ("tests", "docs", "benchmarks") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def run(installed, *words, ranks=0):
    """A command of the environment in the empty folder."""
    launcher = [find_mpiexec(), "-n", str(ranks)] if ranks else []
    # mpi4py looks for pip's MPI in the environment that it runs in, and this one has it from another.
    library = Path(sys.prefix, "lib/libmpi.so.12")
    env = {**clean_environment(), "PATH": f"{installed.bin}:{os.environ['PATH']}", "OPENAI_LOG_FORMAT": "csv",
           **({"MPI4PY_LIBMPI": str(library)} if library.exists() else {})}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([*launcher, str(installed.bin / words[0]), *map(str, words[1:])], cwd=installed.work, env=env,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def test_it_is_the_wheel_that_is_imported(installed):
    found = run(installed, "python", "-c", "import cm, evaluations; print(cm.__file__, evaluations.__file__)")
    assert all(str(installed.site) in path for path in found.split()), found
    names = {path.name for path in installed.site.iterdir()}
    assert {"cm", "evaluations"} <= names and not names & {"datasets", "scripts", "configs", "tests"}


def test_its_metadata(installed):
    found, = installed.site.glob("consistency_toolkit-*.dist-info")
    meta = PathDistribution(found).metadata
    text = meta.get_payload()
    assert isinstance(text, str) and text.startswith("# consistency-toolkit")
    assert meta["Description-Content-Type"] == "text/markdown" and meta["License-Expression"] == "MIT"
    assert {"mpi", "demo", "tf", "wandb", "tensorboard"} <= set(meta.get_all("Provides-Extra"))
    assert any(line.startswith("Programming Language :: Python") for line in meta.get_all("Classifier"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers(installed, command):
    assert "usage: " in run(installed, command, "--help")


def test_the_packages_are_all_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for name in ("cm", "evaluations")
             for path in (ROOT / name).rglob("__init__.py")}
    assert listed == found | {"cm.commands", "cm.dataset_commands", "cm.presets"}


@pytest.mark.mpi
def test_train_distil_sample_and_evaluate_on_two_ranks(installed):
    run(installed, "cm-train", *TINY, "--log_dir", "edm", ranks=2)
    run(installed, "cm-distill", "--config", "digits/cd", "--teacher_model_path", "edm", *TINY[8:], "--log_dir", "cd",
        ranks=2)
    run(installed, "cm-sample", "--model_path", "cd", "--sampler", "onestep", "--num_samples", 60, "--log_dir", "out",
        ranks=2)
    samples, = (installed.work / "out").glob("samples_60x8x8x1.npz")
    run(installed, "cm-classifier", "--data_dir", "digits", "--image_size", 8, "--epochs", 1, "--out", "digits.ts")
    run(installed, "cm-fid", "ref", "--data", "digits", "--image_size", 8, "--inception", "digits.ts", "--images", 60,
        "--dest", "ref.npz")
    run(installed, "cm-eval", "ref.npz", samples, "--inception", "digits.ts", "--metrics", "fid", "--json", "fid.json")
    assert np.isfinite(json.loads((installed.work / "fid.json").read_text())["metrics"]["frechet_distance"]["value"])
    code = "import cm; print(cm.load('cd').sample(1)[0].size)"
    assert run(installed, "python", "-c", code).splitlines()[-1] == "(8, 8)"
    assert Path(samples).exists()
