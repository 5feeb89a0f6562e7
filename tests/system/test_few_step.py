"""The few-step methods through the real scripts on real ranks: the same curve on any ranks, resume, sample."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.commands import assert_same_run, curve, run_programs

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.mpi

RUNS = {
    "ict": ["--training_mode", "ict", "--start_scales", "4", "--end_scales", "16", "--stage_steps", "2"],
    "ect": ["--training_mode", "ect", "--stages", "3", "--stage_steps", "2"],
    "scd": ["--training_mode", "scd", "--tangent_warmup", "3", "--bin_weights", "True"],
    "sct": ["--training_mode", "sct", "--tangent_warmup", "3"],
    "meanflow": ["--training_mode", "meanflow"],
    "alphaflow": ["--training_mode", "alphaflow", "--pair_path", "teacher", "--alpha_steps", "6"],
}
STUDENTS = ("ect", "scd", "alphaflow")                                                 # which start from the teacher
SAMPLERS = {
    "ict": ["--sampler", "onestep"], "scd": ["--sampler", "onestep"],
    "sct": ["--sampler", "onestep"],
    "meanflow": ["--sampler", "flowmap", "--steps", "1"], "alphaflow": ["--sampler", "flowmap", "--steps", "2"],
    "ect": ["--sampler", "multistep", "--steps", "40", "--ts", "0,24,39"],
}
NETWORK = ["--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1",
           "--attention_resolutions", "8", "--num_head_channels", "32", "--class_cond", "True", "--time_scale", "1"]
DATA = ["--data_dir", "digits", "--random_flip", "False", "--lr", "1e-3", "--log_interval", "1"]

HEAD = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import edm_train, cm_train, image_sample
from cm.distributed import setup as dist

RUNS, STUDENTS, SAMPLERS = {RUNS!r}, {STUDENTS!r}, {SAMPLERS!r}

def run(script, *args):
    sys.argv = ["script", *map(str, args)]
    script.main(script.read_flags())

def train(name, folder, steps):
    start = ["--teacher_model_path", "teacher/ema_0.9_000003.pt"] if name in STUDENTS else {NETWORK!r}
    run(cm_train, *start, *{DATA!r}, *RUNS[name], "--global_batch_size", 16, "--microbatch", 8, "--save_interval", 4,
        "--total_training_steps", steps, "--log_dir", folder + "/" + name)
"""

TWO_RANKS = """
def main():
    run(edm_train, *NETWORK, *DATA, "--global_batch_size", 16, "--total_training_steps", 3, "--ema_rate", "0.9",
        "--log_dir", "teacher")
    for name in RUNS:
        train(name, "two", 6)
        train(name, "again", 4)
        train(name, "again", 6)
        run(image_sample, "--model_path", f"two/{name}/ema_0.9999_000006.pt", *SAMPLERS[name],
            "--num_samples", 4, "--log_dir", f"two/{name}")

dist.run(main)
"""

ONE_RANK = """
def main():
    for name in RUNS:
        train(name, "one", 4)

dist.run(main)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few_step")
    run_programs(folder, HEAD + f"NETWORK, DATA = {NETWORK!r}, {DATA!r}\n", [(2, TWO_RANKS), (1, ONE_RANK)])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_ranks_gives_the_same_curve(runs, name):
    two = curve(runs / "two" / name)
    assert len(two) == 6 and np.isfinite(two).all()
    np.testing.assert_allclose(curve(runs / "one" / name), two[:4], rtol=2e-4)     # sums in another order


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_same_run(runs, name):
    assert len(assert_same_run(runs / "two" / name, runs / "again" / name, 6)) == 4


@pytest.mark.parametrize("name", RUNS)
def test_the_result_knows_its_clock_and_how_it_was_trained(runs, name):
    config = json.loads((runs / "two" / name / "checkpoint_000006.json").read_text())["config"]
    assert (config["time_scale"], config["training_mode"]) == (1, name)
    assert config["second_time"] == (name in ("meanflow", "alphaflow"))
    samples = np.load(runs / "two" / name / "samples_4x8x8x3.npz")["arr_0"]
    assert samples.shape == (4, 8, 8, 3) and samples.std() > 0


def test_the_stages_are_in_the_log(runs):
    assert list(curve(runs / "two" / "ict", "num_scales")) == [5, 5, 9, 9, 17, 17]
    assert list(curve(runs / "two" / "ect", "stage")) == [0, 0, 1, 1, 2, 2]


def test_the_size_of_the_tangent_is_in_the_log(runs):
    mean, largest = (curve(runs / "two" / "scd", name) for name in ("tangent", "tangent_max"))
    assert (mean > 0).all() and (mean < largest).all()
    np.testing.assert_allclose(curve(runs / "one" / "scd", "tangent_max"), largest[:4], rtol=1e-3)
