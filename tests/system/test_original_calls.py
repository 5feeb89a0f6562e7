"""The calls of the original's four scripts work, alone and on two ranks; tiny networks, tiny data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from cm.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from support.inception_stand_in import as_pytorch_fid, random_tensors
from support.mpi import ROOT, Finished
from support.warm import mpiexec, python

SCRIPTS = ROOT / "tests/support/original_calls"
NETWORK = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8",
           "num_head_channels": 32}
TRAINING: dict[str, Any] = {"data_dir": "digits", "global_batch_size": 4, "log_interval": 1, "save_interval": 2}
RANKS = [pytest.param(1, id="alone"), pytest.param(2, id="two ranks", marks=pytest.mark.mpi)]

pytestmark = pytest.mark.parametrize("ranks", RANKS)


def run(name: str, ranks: int, log_dir: Path, env: dict[str, str] | None = None, **flags: Any) -> Finished:
    words = [word for flag, value in {**NETWORK, **flags}.items() for word in (f"--{flag}", str(value))]
    command = [str(SCRIPTS / f"{name}.py"), *words]
    env = {"OPENAI_LOGDIR": str(log_dir), **(env or {})}
    finished = python(command, 180, env) if ranks == 1 else mpiexec(ranks, command, 180, env)
    assert finished.rc == 0, finished
    return finished


def save_network(path: Path, distillation: bool = False, **flags: Any) -> str:
    th.manual_seed(0)
    model, _ = create_model_and_diffusion(
        **{**model_and_diffusion_defaults(), **NETWORK, **flags}, distillation=distillation
    )
    for weight in model.parameters():
        weight.data.add_(0.02 * th.randn_like(weight))      # layers that begin at zero do something, too
    th.save(model.state_dict(), path)
    return str(path)


def files(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


@pytest.mark.parametrize("schedule_sampler", [
    pytest.param("uniform", marks=pytest.mark.slow), "lognormal", "loss-second-moment",
])
def test_edm_train(tmp_path: Path, ranks: int, schedule_sampler: str) -> None:
    run("edm_train", ranks, tmp_path, **TRAINING, lr_anneal_steps=4, schedule_sampler=schedule_sampler)
    assert {"model000004.pt", "ema_0.9999_000004.pt", "opt000004.pt"} <= set(files(tmp_path, "*.pt"))
    assert (tmp_path / "progress.csv").exists()


@pytest.mark.parametrize("training_mode", ["consistency_training", "consistency_distillation", "progdist"])
def test_cm_train(tmp_path: Path, ranks: int, training_mode: str) -> None:
    options: dict[str, Any] = {"start_scales": 8}
    if training_mode == "progdist":
        options = {"start_scales": 4, "scale_mode": "progdist", "distill_steps_per_iter": 2}
    if training_mode != "consistency_training":
        options["teacher_model_path"] = save_network(tmp_path / "teacher.pt")
    run("cm_train", ranks, tmp_path, **TRAINING, **options, training_mode=training_mode, loss_norm="l2",
        total_training_steps=4)
    saved = set(files(tmp_path, "*.pt"))
    assert {"model000004.pt", "ema_0.9999_000004.pt", "opt000004.pt"} <= saved
    assert training_mode == "progdist" or "target_model000004.pt" in saved


def test_cm_train_in_half_precision(tmp_path: Path, ranks: int) -> None:
    """The script converts the network before it makes the loop."""
    run("cm_train", ranks, tmp_path, **TRAINING, training_mode="consistency_training", loss_norm="l2", start_scales=8,
        total_training_steps=2, use_fp16=True)
    weights = th.load(tmp_path / "model000002.pt", weights_only=True)
    assert all(value.dtype == th.float32 for value in weights.values())


@pytest.mark.parametrize("sampler", ["heun", "multistep"])
def test_image_sample(tmp_path: Path, ranks: int, sampler: str) -> None:
    model_path = save_network(tmp_path / "model.pt", class_cond=True)
    run("image_sample", ranks, tmp_path, model_path=model_path, class_cond=True, num_samples=6, batch_size=2, steps=4,
        sampler=sampler, ts="0,2,3", training_mode="edm" if sampler == "heun" else "consistency_training")
    with np.load(tmp_path / "samples_6x8x8x3.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.uint8 and labels.shape == (6,)
    assert len(np.unique(images.reshape(6, -1), axis=0)) == 6           # ranks draw noise of their own


def test_ternary_search(tmp_path: Path, ranks: int) -> None:
    model_path = save_network(tmp_path / "model.pt", distillation=True)
    th.save(as_pytorch_fid(random_tensors()), tmp_path / "inception.pth")
    rng = np.random.default_rng(0)
    points = rng.standard_normal((4, 2048))
    np.savez(tmp_path / "ref.npz", mu=points.mean(0), sigma=np.cov(points, rowvar=False))
    finished = run(
        "ternary_search", ranks, tmp_path, {"CM_INCEPTION": str(tmp_path / "inception.pth")}, model_path=model_path,
        ref_batch=tmp_path / "ref.npz", num_samples=2 * ranks, batch_size=2, steps=4, begin=1, end=2,
    )
    found = re.search(r"best (\d) fid (\S+) score (\S+)", finished.stdout)
    assert found and int(found[1]) in (1, 2) and float(found[2]) > 0 and float(found[3]) >= 1, finished
