"""The commands on a tiny network, and what they leave."""

import csv
import json
import sys
from pathlib import Path

import numpy as np

from cm.logging import logger
from support.as_module import as_module
from support.command_line import overridden
from support.mpi import ROOT
from support.warm import mpi_program, mpiexec

NETWORK = ["--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1",
           "--attention_resolutions", "8", "--num_head_channels", "32", "--class_cond", "True"]
TRAIN = ["--data_dir", "digits", "--random_flip", "False", "--lr", "1e-3", "--log_interval", "1"]
QUIET = {"OPENAI_LOG_FORMAT": "log,csv"}


def script(name, *args, ranks=2, expect=0, **options):
    done = mpiexec(ranks, [str(ROOT / name), *overridden(args)], timeout=120, env=QUIET, **options)
    assert done.rc == expect, done
    return done


def edm(log_dir, steps, *options, ranks=2, **more):
    return script("scripts/edm_train.py", *NETWORK, *TRAIN, "--global_batch_size", 16, "--save_interval", 4,
                  "--total_training_steps", steps, "--log_dir", log_dir, *options, ranks=ranks, **more)


def files_of(directory, step):
    return {p.name: p.read_bytes() for p in Path(directory).glob(f"*{step:06d}.pt")}


def samples_of(name, folder):
    """Run a script that samples, in this process and by sys.argv: the arrays it leaves in a folder, and its summary."""
    module = as_module(ROOT / "scripts" / name)
    module.main(module.read_flags())
    logger.reset()
    path = next(folder.glob("samples_*.npz"))
    return dict(np.load(path)), json.loads(path.with_suffix(".json").read_text())


def curve(directory, column="loss"):
    """A column of a run's log."""
    with open(Path(directory) / "progress.csv") as file:
        return np.array([float(row[column]) for row in csv.DictReader(file)])


def run_programs(folder, head, programs):
    """Run Python programs, (ranks, text) each, one after the other in a folder; each begins with `head`."""
    for ranks, text in programs:
        done = mpi_program(folder, ranks, f"import os\nos.chdir({str(folder)!r})\n{head}{text}", timeout=240, env=QUIET)
        assert done.rc == 0, done


def assert_same_run(first, second, step):
    """Two runs have the same log of losses and the same bytes in every file of a step; returns these files."""
    assert np.array_equal(curve(first), curve(second))
    files = files_of(first, step)
    assert files == files_of(second, step)
    return files


def is_rank(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().startswith(sys.executable)
