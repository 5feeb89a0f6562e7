"""--profile: two files of a few steps, the same training, every rank through the same steps."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch as th
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent, FunctionEventAvg

from cm.data.loader import load_data
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.script_util import create_model
from cm.train_util import TrainLoop
from cm.training.profiler import REST, TABLE, TRACE, WARM_UP, Cost, Profile, costs_of, table
from support.warm import mpiexec

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2
TRAIN = ["--data_dir", "digits", "--image_size", 8, "--num_channels", 32, "--num_res_blocks", 1, "--channel_mult", "1",
         "--attention_resolutions", 8, "--num_head_channels", 32, "--random_flip", False, "--global_batch_size", 8]


def traced_names(folder):
    with gzip.open(folder / TRACE, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


@pytest.mark.mpi
def test_two_ranks_are_traced_for_as_many_steps_as_asked(tmp_path):
    """The flag of a script; the trace holds so many optimizer steps and passes of DDP."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TRACE).symlink_to(tmp_path / "victim")              # is replaced, not followed
    done = mpiexec(2, [ROOT / "scripts" / "edm_train.py", *map(str, TRAIN), "--log_dir", tmp_path / "run",
                       "--total_training_steps", str(WARM_UP + STEPS + 1), "--profile", str(STEPS)], timeout=120)
    assert done.rc == 0, done
    assert not (tmp_path / "victim").exists()
    tmp_path /= "run"
    names = traced_names(tmp_path)
    assert sum(name.startswith("Optimizer.step") for name in names) == STEPS
    assert sum(name == "DistributedDataParallel.forward" for name in names) == STEPS
    rows = (tmp_path / TABLE).read_text().splitlines()
    assert len(rows) == 11 and "aten::convolution_backward" in "".join(rows)
    assert rows[0].split() == ["operation", "ms/step", "share", "calls/step"]
    shares = [float(re.search(r"([\d.]+)%", row)[1]) for row in rows[1:]]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    assert all(row in done.stdout + done.stderr for row in rows), "the log has the table, too"


def train(folder, steps, *callbacks):
    logger.configure(str(folder), format_strs=["log"])
    th.manual_seed(0)
    TrainLoop(
        model=create_model(8, 32, 1, "1", attention_resolutions="8", num_head_channels=32), batch_size=4, lr=1e-3,
        diffusion=KarrasDenoiser(loss_norm="l2"), ema_rate="0.5", log_interval=10, save_interval=100, resume="never",
        total_training_steps=steps, callbacks=callbacks,
        data=load_data(data_dir="digits", batch_size=4, image_size=8, num_workers=0),
    ).run_loop()
    logger.reset()
    return (folder / "log.txt").read_text()


def test_training_is_the_same_and_a_run_that_ends_sooner_leaves_what_there_is(tmp_path):
    train(tmp_path / "traced", WARM_UP + 1, Profile(100))
    train(tmp_path / "plain", WARM_UP + 1)
    assert sum(name.startswith("Optimizer.step") for name in traced_names(tmp_path / "traced")) == 1
    assert not (tmp_path / "plain" / TRACE).exists()
    for name in (f"model{WARM_UP + 1:06d}.pt", f"opt{WARM_UP + 1:06d}.pt"):
        assert (tmp_path / "traced" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_run_that_ends_within_the_warm_up_says_so(tmp_path):
    assert "nothing to trace" in train(tmp_path, WARM_UP, Profile(100))
    assert not (tmp_path / TABLE).exists()


def test_the_table_counts_by_step_and_names_the_ten_longest():
    costs = [Cost(f"op{i}", i / 1000, 4 * i) for i in range(1, 13)]
    rows = table(costs, 4).splitlines()[1:]
    assert len(rows) == 10 and rows[0].split() == ["op12", "3.00", "15.4%", "12.0"]
    assert rows[-1].startswith("op3")


def average(name, kernels, device_type=DeviceType.CUDA, annotation=False):
    """A row of torch's profiler: of kernels on a GPU, or of an operation on the CPU that launched some, in ms."""
    event = FunctionEvent(0, name, 0, 0, 1000 * sum(kernels), device_type=device_type, use_device="cuda",
                          is_user_annotation=annotation)
    for duration in kernels if device_type == DeviceType.CPU else ():
        event.append_kernel("kernel", 0, 1000 * duration)
    row = FunctionEventAvg()
    row.add(event)
    return row


def test_each_kernel_of_a_gpu_counts_once():
    events = [
        average("aten::conv", [3, 1], DeviceType.CPU), average("aten::add", [2], DeviceType.CPU),
        average("implicit_gemm", [3, 1]), average("vectorized_add", [2]), average("generated", [1]),
        average("Optimizer.step", [6], annotation=True),
    ]
    assert events[0].self_device_time_total == events[2].self_device_time_total == 4000
    found = {cost.name: round(cost.seconds, 9) for cost in costs_of(events, on_device=True)}
    assert found == {"aten::conv": 0.004, "aten::add": 0.002, REST: 0.001}
    assert costs_of(events[:4], on_device=True)[-1].name == "aten::add"
