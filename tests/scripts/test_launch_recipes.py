"""scripts/launch.sh: every recipe is a run that its script accepts, with the numbers of the paper."""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml

from cm.config.schema import ModelConfig
from cm.script_util import create_model
from cm.setup import dry_run as set_up_dry_run
from cm.setup import train as set_up
from support.mpi import clean_environment, start

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = str(ROOT / "scripts" / "launch.sh")
# Those of the published files; for CIFAR-10 those of EDM's NCSN++ and DDPM++, with augmentation labels where it has
# them, and of DDPM's network.
PARAMETERS = {"imagenet64": 295_899_267, "bedroom256": 526_304_771, "cat256": 526_304_771, "cifar10": 56_395_523,
              "cdm_cifar10": 55_733_891, "stf_cifar10": 56_397_827, "sadpm_cifar10": 35_746_307,
              "cdm_ffhq64": 61_805_571, "cdm_afhqv2": 61_805_571, "sadpm_celeba64": 78_700_803,
              "sadpm_ffhq64": 78_700_803, "sadpm_afhqv2": 78_700_803}

# Consistency Models (arXiv 2303.01469), table 3; the lr of ct_bedroom256 is the preset's own choice.
COMMON = {"dropout": 0.0, "weight_schedule": "uniform", "optimizer": "radam", "weight_decay": 0.0, "lr_anneal_steps": 0}
CD = COMMON | {"training_mode": "consistency_distillation", "target_ema_mode": "fixed", "scale_mode": "fixed"}
CT = COMMON | {"training_mode": "consistency_training", "target_ema_mode": "adaptive", "scale_mode": "progressive",
               "start_scales": 2, "loss_norm": "lpips", "teacher_model_path": ""}


def summed(side: int) -> dict[str, float]:
    """Clipping at 1 and Adam's eps of 1e-8 of a loss that is a sum over the numbers of an image, for one that is their
    mean; to three digits.
    """
    return {name: float(f"{value / (3 * side**2):.3g}") for name, value in (("grad_clip", 1), ("adam_eps", 1e-8))}


# The authors' runs: EDM's with a term more (2302.09057, 2302.00670), and DDPM's (2312.12431).
EDM_RUN = {"objective": "", "precond": "edm", "optimizer": "adam", "lr": 1e-3, "global_batch_size": 512,
           "dropout": 0.13, "augment": 0.12, "total_kimg": 200_000, "ema_halflife_kimg": 500}
DENOISERS = {
    "cdm_cifar10": EDM_RUN | {"objective": "cdm", "arch": "ddpmpp", "martingale_lambda": 10, "martingale_steps": 6},
    "stf_cifar10": EDM_RUN | {"objective": "stf", "arch": "ncsnpp", "num_references": 4096},
    "sadpm_cifar10": {"objective": "sadpm", "precond": "ddpm", "arch": "unet", "optimizer": "adam", "lr": 2e-4,
                      "global_batch_size": 128, "num_consecutive_steps": 2, "sa_lambda": 0.2, **summed(32)},
}
for data, dropout in (("ffhq64", 0.05), ("afhqv2", 0.25)):
    DENOISERS[f"cdm_{data}"] = DENOISERS["cdm_cifar10"] | {
        "lr": 2e-4, "global_batch_size": 256, "augment": 0.15, "dropout": dropout}
for data, sa_lambda in (("celeba64", 1.0), ("ffhq64", 0.5), ("afhqv2", 0.2)):
    DENOISERS[f"sadpm_{data}"] = DENOISERS["sadpm_cifar10"] | {"sa_lambda": sa_lambda, "image_size": 64, **summed(64)}
TABLE_3 = {
    "cd_cifar10": CD | {"lr": 4e-4, "global_batch_size": 512, "start_ema": 0.0, "start_scales": 18, "use_fp16": False,
                        "total_training_steps": 800_000},
    "ct_cifar10": CT | {"lr": 4e-4, "global_batch_size": 512, "start_ema": 0.9, "end_scales": 150, "use_fp16": False,
                        "total_training_steps": 800_000},
    "cd_imagenet64_lpips": CD | {"lr": 8e-6, "global_batch_size": 2048, "start_ema": 0.95, "start_scales": 40,
                                 "use_fp16": True, "total_training_steps": 600_000, "class_cond": True},
    "ct_imagenet64": CT | {"lr": 8e-6, "global_batch_size": 2048, "start_ema": 0.95, "end_scales": 200,
                           "use_fp16": True, "total_training_steps": 800_000, "class_cond": True},
    "cd_bedroom256_lpips": CD | {"lr": 1e-5, "global_batch_size": 2048, "start_ema": 0.95, "start_scales": 40,
                                 "use_fp16": True, "total_training_steps": 600_000, "class_cond": False},
    "ct_bedroom256": CT | {"lr": 1e-5, "global_batch_size": 2048, "start_ema": 0.95, "end_scales": 150,
                           "use_fp16": True, "total_training_steps": 1_000_000, "class_cond": False},
}
# The model card of the published checkpoints: (ts, steps).
TWO_STEPS = {
    "multistep_cd_imagenet64_l2": ("0,22,39", 40), "multistep_cd_imagenet64_lpips": ("0,22,39", 40),
    "multistep_ct_imagenet64": ("0,106,200", 201), "multistep_cd_bedroom256_l2": ("0,18,39", 40),
    "multistep_cd_bedroom256_lpips": ("0,17,39", 40), "multistep_ct_bedroom256": ("0,67,150", 151),
    "multistep_ct_cat256": ("0,62,150", 151),
}
PUBLISHED = [f"{kind}_{data}{norm}" for data in ("imagenet64", "bedroom256", "cat256")
             for kind, norm in (("edm", ""), ("cd", "_l2"), ("cd", "_lpips"), ("ct", ""))]


def model_flags() -> list[str]:
    return [field.name for field in dataclasses.fields(ModelConfig)]


def launch(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", LAUNCH, *args], capture_output=True, text=True, env=clean_environment(env))


def recipe_names() -> list[str]:
    return re.findall(r"^  (\w+)  +\S.*$", launch().stdout, re.MULTILINE)


NAMES = recipe_names()


def command_of(name: str, *flags: str, **env: str) -> list[str]:
    """What the recipe would start, a word each: script and flags."""
    done = launch(name, *flags, LAUNCHER=r"printf %s\n", PYTHON=sys.executable, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]


@functools.cache
def script_of(path: str):
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def parameters(network: tuple) -> int:
    with th.device("meta"):
        return sum(param.numel() for param in create_model(**dict(network)).parameters())


@pytest.fixture
def dry_run(monkeypatch, tmp_path):
    """The settings that a recipe's script ends up with. The searches want their reference to exist."""
    for name in ("VIRTUAL_imagenet64_labeled", "VIRTUAL_lsun_bedroom256", "VIRTUAL_lsun_cat256", "cifar10-32x32"):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    found = []

    def resolve(name: str) -> dict:
        script, *flags = command_of(name, "--dry_run", REFS=str(tmp_path))
        monkeypatch.setattr(sys, "argv", [script, *flags])
        module = script_of(script)
        monkeypatch.setattr(set_up_dry_run, "dry_run", found.append)
        monkeypatch.setattr(set_up, "dry_run", found.append)
        module.main(module.read_flags())
        return found.pop().values

    return resolve


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves(dry_run, name):
    resolved = dry_run(name)
    model = re.sub("^(heun|ito|ddim|onestep|multistep|search)_", "", name)
    kind, data, *_ = model.split("_")
    if name == model:                                               # samplers take the checkpoint's own network
        network = {key: resolved[key] for key in model_flags() if key not in ("dropout", "num_classes")}
        assert parameters(tuple(network.items())) == PARAMETERS.get(model, PARAMETERS.get(data))
    assert resolved["log_dir"] == f"runs/{name}"
    if name == model:
        assert (TABLE_3 | DENOISERS).get(name, {}).items() <= resolved.items()
        assert resolved["teacher_model_path" if kind == "cd" else "data_dir"]
    else:
        assert resolved["model_path"] == f"models/{model}{'_ema' if kind == 'edm' else ''}.pt"
        assert resolved["num_samples"] == 50_000
        modes = {"cd": "consistency_distillation", "ct": "consistency_training"}
        assert resolved["training_mode"] == modes.get(kind, "edm")
    if name in TWO_STEPS:
        assert (resolved["sampler"], resolved["ts"], resolved["steps"]) == ("multistep", *TWO_STEPS[name])
    if name.startswith("search_"):
        assert (resolved["begin"], resolved["end"]) == ("0", str(resolved["steps"] - 1))
        assert resolved["ref_batch"].endswith(".npz")


def test_every_published_model_can_be_trained_and_sampled():
    sampled = [f"{'heun' if model.startswith('edm') else 'onestep'}_{model}" for model in PUBLISHED]
    assert {*PUBLISHED, *sampled, *TWO_STEPS} <= set(NAMES) and len(NAMES) == len(set(NAMES))


def test_the_page_counts_the_recipes():
    assert f"lists {len(NAMES)} recipes" in (ROOT / "docs/features.md").read_text()


def test_l2_and_lpips_differ_in_the_distance_alone(dry_run):
    for data in ("imagenet64", "bedroom256"):
        l2, lpips = dry_run(f"cd_{data}_l2"), dry_run(f"cd_{data}_lpips")
        assert {key for key in l2 if l2[key] != lpips[key]} == {"loss_norm", "log_dir"}


def test_every_preset_has_a_recipe():
    """Or is a command of docs/few-step.md."""
    used = {command_of(name)[2] for name in NAMES}
    folders = {Path(path).parent for path in used}
    page = (ROOT / "docs/few-step.md").read_text()
    used |= {str(ROOT / path) for path in re.findall(r"configs/\w+/\w+[.]yaml", page)}
    for folder in folders:
        assert {str(path) for path in folder.glob("*.yaml") if path.name != "network.yaml"} <= used


def test_nothing_in_a_preset_is_said_twice():
    for path in (ROOT / "configs").glob("*/*.yaml"):
        own = yaml.safe_load(path.read_text())
        base = own.pop("base", None)
        if base:
            assert not own.keys() & yaml.safe_load((path.parent / base).read_text()).keys(), path


def test_an_unknown_name_lists_the_choices():
    done = launch("cd_imagenet")
    assert done.returncode == 2 and "'cd_imagenet'" in done.stderr
    assert all(name in done.stderr for name in NAMES)


def test_sampling_presets_hold_sampling_flags_only():
    """Else they would contradict checkpoints that know their networks, such as conditional ones."""
    free = {"use_fp16"}                                             # each run chooses its own
    for path in (ROOT / "configs").glob("*/sample_*.yaml"):
        assert not yaml.safe_load(path.read_text()).keys() & ({*model_flags()} - free), path


def test_runs_serve_where_a_published_file_is_missing(tmp_path):
    (tmp_path / "edm_cifar10").mkdir()
    words = command_of("cd_cifar10", RUNS=str(tmp_path), MODELS=str(tmp_path / "m"))
    assert words[words.index("--teacher_model_path") + 1] == f"{tmp_path}/edm_cifar10"
    words = command_of("onestep_cd_cifar10", RUNS=str(tmp_path), MODELS="m")
    assert words[words.index("--model_path") + 1] == "m/cd_cifar10.pt"


def test_folders_ranks_and_flags_of_the_user():
    words = command_of("cd_cat256_l2", "--lr", "1", "--note", "two words", DATA="/my data", MODELS="m", RUNS="/r")
    assert words[words.index("--data_dir") + 1] == "/my data/lsun_cat"
    assert words[words.index("--teacher_model_path") + 1] == "m/edm_cat256_ema.pt"
    assert words[words.index("--log_dir") + 1] == "/r/cd_cat256_l2"
    assert words[-4:] == ["--lr", "1", "--note", "two words"]
    assert "--dry_run" not in words and "--dry_run" in command_of("cd_cat256_l2", DRY_RUN="1")


def test_without_an_interpreter():
    done = launch("ct_cifar10", PYTHON="/nowhere/python")
    assert done.returncode == 2 and "/nowhere/python" in done.stderr


def test_without_a_launcher():
    done = launch("ct_cifar10", PYTHON=sys.executable, LAUNCHER="/nowhere/mpiexec -n 8")
    assert done.returncode == 2 and "there is no /nowhere/mpiexec" in done.stderr and "LAUNCHER" in done.stderr


@pytest.mark.mpi
def test_a_recipe_under_mpiexec(tmp_path):
    done = start(["bash", LAUNCH, "ct_cifar10", "--lr", "1e-4"], cwd=tmp_path,
                 env={"RANKS": "1", "DRY_RUN": "1", "PYTHON": sys.executable})
    assert done.rc == 2 and "does not exist" in done.stderr, "there is no data here"
    resolved = json.loads(done.stdout)
    assert (resolved["ranks"], resolved["lr"], resolved["loss_norm"]) == (1, 1e-4, "lpips")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "code", "queued"), [
    ('{"finished": false}', 0, "requeue 17"), ('{"finished": true}', 0, ""), ('{"finished": false}', 3, ""),
    ("", 0, ""),
], ids=["stopped", "finished", "failed", "no training"])
def test_a_slurm_job_whose_training_was_stopped_queues_again(tmp_path, status, code, queued):
    """train.sbatch with a stand-in for the interpreter, which leaves the status of a run, and for scontrol."""
    for name, body in {"scontrol": f'echo "$@" >> {tmp_path}/queued',
                       "python": f"mkdir -p {tmp_path}/edm_cifar10\n"
                                 f"test -z '{status}' || echo '{status}' > {tmp_path}/edm_cifar10/status.json\n"
                                 f"exit {code}"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = start(["bash", ROOT / "scripts" / "slurm" / "train.sbatch", "edm_cifar10"], env={
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "1", "LAUNCHER": "env",
        "PYTHON": str(tmp_path / "python"), "RUNS": str(tmp_path), "DATA": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    })
    assert done.rc == code, done
    assert ((tmp_path / "queued").read_text().strip() if (tmp_path / "queued").exists() else "") == queued
