"""The commands as a user runs them, under real mpiexec: train, kill, resume, sample, evaluate, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th

from evaluations.features import save_torchscript
from support.commands import NETWORK, QUIET, TRAIN, curve, edm, files_of, is_rank, script
from support.mpi import clean_environment, descendants, find_mpiexec
from support.warm import python

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.mpi











@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An EDM run of 12 steps on 2 ranks that nobody disturbed."""
    directory = tmp_path_factory.mktemp("teacher")
    edm(directory, 12)
    return directory


@pytest.fixture(scope="module")
def consistency_model(teacher, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cd")
    script("scripts/cm_train.py", *TRAIN, "--teacher_model_path", teacher / "ema_0.9999_000012.pt", "--loss_norm", "l2",
           "--global_batch_size", 8, "--total_training_steps", 3, "--start_ema", 0.9, "--start_scales", 6,
           "--weight_schedule", "uniform", "--log_dir", directory)
    return directory / "ema_0.9999_000003.pt"


def test_killed_and_started_again_is_the_same_run(teacher, tmp_path):
    """kill -9 of a rank in the middle of training; the same command goes on and ends with the same bytes."""
    command = [find_mpiexec(), "-n", "2", sys.executable, str(ROOT / "scripts/edm_train.py"), *NETWORK, *TRAIN,
               "--global_batch_size", "16", "--save_interval", "4", "--total_training_steps", "12",
               "--log_dir", str(tmp_path)]
    job = subprocess.Popen(command, env=clean_environment(QUIET), stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (tmp_path / "checkpoint_000004.json").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    victim = [pid for pid in descendants(job.pid) if is_rank(pid)][-1]
    os.kill(victim, signal.SIGKILL)
    assert job.wait(timeout=15) != 0
    assert not (tmp_path / "checkpoint_000012.json").exists()
    again = edm(tmp_path, 12)
    assert "resuming from step" in (tmp_path / "log.txt").read_text(), again
    assert files_of(tmp_path, 12) == files_of(teacher, 12)
    assert len(files_of(tmp_path, 12)) == 4
    assert np.array_equal(curve(tmp_path), curve(teacher))




def test_two_ranks_go_on_from_a_checkpoint_in_another_folder(teacher, tmp_path):
    edm(tmp_path, 12, "--resume_checkpoint", teacher / "model000008.pt")
    assert files_of(tmp_path, 12) == files_of(teacher, 12)
    assert np.array_equal(curve(tmp_path), curve(teacher)[8:])


@pytest.mark.parametrize("ranks", [1, 4])
def test_any_number_of_ranks_gives_the_same_curve(teacher, tmp_path, ranks):
    edm(tmp_path, 4, ranks=ranks)
    # The samples and their noise are the same; only the order in which gradients are added differs.
    np.testing.assert_allclose(curve(tmp_path), curve(teacher)[:4], rtol=2e-5)


def test_consistency_training_gives_the_same_curve_on_any_ranks(tmp_path):
    """With gradients that are clipped to their norm over all ranks and microbatches."""
    curves = []
    for ranks, microbatch in ((1, 4), (2, -1)):
        script("scripts/cm_train.py", *NETWORK, *TRAIN, "--training_mode", "consistency_training", "--loss_norm", "l2",
               "--global_batch_size", 8, "--total_training_steps", 4, "--weight_schedule", "uniform",
               "--target_ema_mode", "adaptive", "--start_ema", 0.9,
               "--scale_mode", "progressive", "--start_scales", 2, "--end_scales", 8,
               "--log_dir", tmp_path / str(ranks), "--grad_clip", 0.01, "--microbatch", microbatch, ranks=ranks)
        curves.append(curve(tmp_path / str(ranks)))
        clipped = (tmp_path / str(ranks) / "progress.csv").read_text().splitlines()
        assert clipped[-1].split(",")[clipped[0].split(",").index("clipped_grad_norm")] == "0.01"
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-5)


def sample(model_path, log_dir, *options, ranks=2, num_samples=7, **more):
    script("scripts/image_sample.py", "--model_path", model_path, "--num_samples", num_samples, "--log_dir", log_dir,
           *options, ranks=ranks, **more)
    return log_dir / f"samples_{num_samples}x8x8x3.npz"


MULTISTEP = ("--sampler", "multistep", "--steps", 6, "--ts", "0,3,5")


def test_samples_depend_on_seed_and_index_alone(consistency_model, tmp_path):
    """No architecture flags; the same images from 2 ranks in batches of 2 and from 1 rank in a batch of 5."""
    two = np.load(sample(consistency_model, tmp_path / "two", *MULTISTEP, "--batch_size", 2))
    one = np.load(sample(consistency_model, tmp_path / "one", *MULTISTEP, "--batch_size", 5, ranks=1))
    assert two["arr_0"].shape == (7, 8, 8, 3) and two["arr_0"].dtype == np.uint8
    assert np.array_equal(two["arr_1"], one["arr_1"]) and len(set(two["arr_1"].tolist())) > 1
    # Batches of other sizes may round differently in the last bit, which truncation can show as one grey level.
    assert np.abs(two["arr_0"].astype(int) - one["arr_0"]).max() <= 1
    assert (two["arr_0"] != one["arr_0"]).mean() < 0.01
    assert (tmp_path / "two" / "samples_7x8x8x3.png").exists()
    assert json.loads((tmp_path / "two" / "samples_7x8x8x3.json").read_text())["network_evaluations"] == 2


def test_train_sample_evaluate(teacher, tmp_path):
    ema = teacher / "ema_0.9999_000012.pt"
    samples = sample(ema, tmp_path / "heun", "--sampler", "heun", "--steps", 3, num_samples=40)
    summary = json.loads(samples.with_suffix(".json").read_text())
    assert summary["network_evaluations"] == 5
    extractor = tmp_path / "features.ts"
    th.manual_seed(0)
    save_torchscript(TinyExtractor(), str(extractor), "tiny", "none")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ref.npz", arr_0=rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    script("evaluations/evaluator.py", tmp_path / "ref.npz", samples, "--inception", extractor, "--trust_extractor",
           "--json", tmp_path / "metrics.json", ranks=1)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics["frechet_distance"]["sample_count"] == 40 and metrics["frechet_distance"]["value"] > 0


class TinyExtractor(th.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = th.nn.Conv2d(3, 8, 8)

    def forward(self, images):
        return self.conv(images.float() / 255).flatten(1)


def test_dry_run_prints_the_resolved_run_and_writes_nothing(tmp_path):
    done = edm(tmp_path / "run", 5, "--dry_run")
    resolved = json.loads(done.stdout)
    assert (resolved["ranks"], resolved["global_batch_size"], resolved["image_size"]) == (2, 16, 8)
    assert resolved["parameters"] > 100_000
    assert not (tmp_path / "run").exists()


def text(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    return tmp_path / name


@pytest.fixture
def folders(tmp_path):
    """Data that cannot be trained on."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(20):
        (tmp_path / "broken" / f"a_{i}.png").write_text("this is no image")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "unlabelled.npz", arr_0=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    text(tmp_path, "file", "in the way")
    return tmp_path


BAD_TRAINING = {
    "missing data": (["--data_dir", "{}/nowhere"], "nowhere"),
    "no data": (["--data_dir", ""], "--data_dir is missing"),
    "empty data": (["--data_dir", "{}/empty"], "empty"),
    "undecodable image": (["--data_dir", "{}/broken"], "a_"),
    "no labels": (["--data_dir", "{}/unlabelled.npz"], "class_cond"),
    "image size the network cannot take": (["--image_size", "9", "--channel_mult", "1,1"], "9"),
    "fewer images than ranks": (["--global_batch_size", "1"], "1 leaves some of 2 ranks without an image"),
    "nothing to resume": (["--resume", "{}/nowhere"], "--resume {}/nowhere: no such file"),
    "wrong flag": (["--learning_rate", "1"], "--learning_rate"),
    "unwritable log_dir": (["--log_dir", "{}/file/run"], "file"),
    "wrong ema_rate": (["--ema_rate", "2"], "--ema_rate"),
    "wrong mode of labels": (["--learn_sigma", "True"], "--learn_sigma"),
}


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_training_input_is_one_clear_error(folders, name):
    options, word = BAD_TRAINING[name]
    done = edm(folders / "run", 3, *[option.format(folders) for option in options], expect=2)
    assert word.format(folders) in done.stderr, done
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1, done


def test_another_network_does_not_go_on(teacher, tmp_path):
    """The same folder with another architecture: what does not fit is listed, and nothing is touched."""
    shutil.copytree(teacher, tmp_path / "run")
    before = files_of(tmp_path / "run", 12)
    done = edm(tmp_path / "run", 14, "--num_channels", 64, expect=2)
    assert "model000012.pt does not fit this network" in done.stderr and "of another shape" in done.stderr, done
    done = edm(tmp_path / "new", 14, "--resume", teacher / "checkpoint_000008.json", "--num_channels", 64, expect=2)
    assert "num_channels" in done.stderr and "64" in done.stderr and "32" in done.stderr, done
    assert files_of(tmp_path / "run", 12) == before and not (tmp_path / "new").exists()


BAD_SAMPLING = {
    "contradiction": (["--num_channels", "64"], ["--num_channels", "64", "ema_0.9999_000003.pt", "32"]),
    "multistep without ts": (["--sampler", "multistep", "--steps", "6"], ["ts"]),
    "ts out of range": (["--sampler", "multistep", "--steps", "6", "--ts", "0,9"], ["9"]),
    "ts that does not end": (["--sampler", "multistep", "--steps", "6", "--ts", "0,3"], ["5"]),
    "no samples": (["--num_samples", "0"], ["num_samples=0 is too small"]),
    "negative samples": (["--num_samples", "-3"], ["num_samples=-3 is too small"]),
    "class that is not there": (["--class_label", "10"], ["--class_label 10", "0 to 9"]),
    "unknown sampler": (["--sampler", "huen"], ["'huen'", "Did you mean 'heun'"]),
    "missing checkpoint": (["--model_path", "nowhere.pt"], ["--model_path nowhere.pt", "no such file"]),
    "file that is no checkpoint": (["--model_path", "{}/file"], ["file"]),
}


@pytest.mark.parametrize("name", BAD_SAMPLING)
def test_bad_sampling_input_is_one_clear_error(consistency_model, folders, name):
    options, words = BAD_SAMPLING[name]
    done = script("scripts/image_sample.py", "--model_path", consistency_model, "--num_samples", 4, "--log_dir",
                  folders / "run", *[option.format(folders) for option in options], expect=2)
    assert all(word in done.stderr for word in words), done
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1, done


def test_plain_python_without_mpiexec(consistency_model, tmp_path):
    done = python([str(ROOT / "scripts/image_sample.py"), "--model_path", str(consistency_model),
                   "--sampler", "onestep", "--num_samples", "3", "--log_dir", str(tmp_path)], env=QUIET)
    assert done.rc == 0, done
    assert np.load(tmp_path / "samples_3x8x8x3.npz")["arr_0"].shape == (3, 8, 8, 3)
