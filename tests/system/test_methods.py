"""cdm, stf and sadpm through the real scripts on real ranks: the same curve on any ranks, resume, distil, sample."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.commands import assert_same_run, curve, run_programs

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.mpi

RUNS = {
    "cdm": ["--objective", "cdm", "--martingale_lambda", "3", "--martingale_steps", "3"],
    "stf": ["--objective", "stf", "--num_references", "90"],
    "sadpm": ["--objective", "sadpm", "--sa_lambda", "0.5"],
    "sadpm_karras": ["--objective", "sadpm", "--precond", "edm", "--num_consecutive_steps", "3"],
}
NETWORK = ["--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1",
           "--attention_resolutions", "8", "--num_head_channels", "32", "--class_cond", "True"]
DATA = ["--data_dir", "digits", "--random_flip", "False", "--lr", "1e-3", "--log_interval", "1"]

HEAD = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import edm_train, cm_train, image_sample
from cm.distributed import setup as dist

RUNS = {RUNS!r}

def run(script, *args):
    sys.argv = ["script", *map(str, args)]
    script.main(script.read_flags())

def train(name, folder, steps, *more):
    run(edm_train, *{NETWORK + DATA!r}, *RUNS[name], "--global_batch_size", 16, "--save_interval", 4,
        "--total_training_steps", steps, "--log_dir", folder + "/" + name, *more)
"""

TWO_RANKS = """
def main():
    for name in RUNS:
        train(name, "two", 6)
        train(name, "again", 4)
        train(name, "again", 6)
    for name in ("stf", "sadpm"):
        run(cm_train, *DATA, "--teacher_model_path", f"two/{name}/ema_0.9999_000006.pt", "--loss_norm", "l2",
            "--global_batch_size", 8, "--total_training_steps", 3, "--start_ema", 0.9, "--start_scales", 6,
            "--weight_schedule", "uniform", "--log_dir", f"cd/{name}")
        run(image_sample, "--model_path", f"cd/{name}/ema_0.9999_000003.pt", "--sampler", "onestep",
            "--num_samples", 4, "--log_dir", f"cd/{name}")
    run(image_sample, "--model_path", "two/sadpm/model000006.pt", "--sampler", "heun", "--steps", 3,
        "--num_samples", 4, "--log_dir", "two/sadpm")

dist.run(main)
"""

ONE_RANK = """
def main():
    for name in RUNS:
        train(name, "one", 4)
        train(name, "elastic", 6, "--resume_checkpoint", f"two/{name}/model000004.pt")

dist.run(main)
"""

FOUR_RANKS = """
def main():
    for name in ("stf", "sadpm"):                           # the one whose ranks exchange images, and one that does not
        train(name, "four", 4)

dist.run(main)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    run_programs(folder, HEAD + f"DATA = {DATA!r}\n", [(2, TWO_RANKS), (1, ONE_RANK), (4, FOUR_RANKS)])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_ranks_gives_the_same_curve(runs, name):
    """And a checkpoint of two ranks goes on on one."""
    two = curve(runs / "two" / name)
    assert len(two) == 6 and np.isfinite(two).all()
    # The samples, their noise and their references are the same; gradients are added in another order.
    for ranks in ("one", "four") if name in ("stf", "sadpm") else ("one",):
        np.testing.assert_allclose(curve(runs / ranks / name), two[:4], rtol=5e-5)
    np.testing.assert_allclose(curve(runs / "elastic" / name), two[4:], rtol=5e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_same_run(runs, name):
    assert len(assert_same_run(runs / "two" / name, runs / "again" / name, 6)) == 4


def test_the_log_says_what_each_adds(runs):
    for name, column in [("cdm", "martingale"), ("stf", "effective_references"), ("sadpm", "sequence")]:
        assert np.isfinite(curve(runs / "two" / name, column)).all()
    assert (curve(runs / "two" / "stf", "effective_references") > 1).all()


@pytest.mark.parametrize("name, precond", [("stf", "edm"), ("sadpm", "ddpm")])
def test_they_can_be_distilled(runs, name, precond):
    """The student takes its teacher's preconditioning from the checkpoint, and the sampler the student's."""
    config = json.loads((runs / "cd" / name / "checkpoint_000003.json").read_text())["config"]
    assert (config["precond"], config["training_mode"]) == (precond, "consistency_distillation")
    assert np.isfinite(curve(runs / "cd" / name)).all() and len(curve(runs / "cd" / name)) == 3
    assert np.load(runs / "cd" / name / "samples_4x8x8x3.npz")["arr_0"].shape == (4, 8, 8, 3)


def test_a_ddpm_network_needs_no_flag_to_be_sampled_by_any_sampler(runs):
    assert np.load(runs / "two" / "sadpm" / "samples_4x8x8x3.npz")["arr_0"].std() > 0
