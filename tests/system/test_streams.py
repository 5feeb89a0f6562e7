"""Training on shards of a WebDataset by the real command: resumed bit for bit, and the same curve on two ranks."""

import sys

import numpy as np
import pytest

from cm.errors import UserError
from cm.logging import logger
from support.as_module import as_module
from support.commands import NETWORK, curve, files_of, script
from support.mpi import ROOT
from support.shards import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("streams") / "shards", (4, 9, 6))
    return f"{folder}/set-{{000..002}}.tar"


def flags(shards, folder, steps):
    return [*NETWORK, "--num_classes", "3", "--data_dir", shards, "--shuffle_window", "5", "--num_workers", "0",
            "--global_batch_size", "8", "--lr", "1e-3", "--log_interval", "1", "--save_interval", "2",
            "--total_training_steps", str(steps), "--log_dir", str(folder)]


@pytest.fixture
def train(shards, monkeypatch):
    """Train in this process, on one rank."""
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv")

    def run(folder, steps):
        monkeypatch.setattr(sys, "argv", ["edm_train.py", *flags(shards, folder, steps)])
        try:
            script = as_module(ROOT / "scripts/edm_train.py")
            script.main(script.read_flags())
        finally:
            logger.reset()
        return folder

    return run


@pytest.mark.mpi
def test_a_resumed_run_and_two_ranks_see_the_same_images(train, shards, tmp_path):
    """Seven steps of 8 images are almost three epochs of 19."""
    whole = train(tmp_path / "whole", 7)
    train(tmp_path / "parts", 3)
    parts = train(tmp_path / "parts", 7)
    assert "resuming from step" in (parts / "log.txt").read_text()
    assert files_of(parts, 7) == files_of(whole, 7) and len(files_of(whole, 7)) == 4
    assert np.array_equal(curve(parts), curve(whole))
    script("scripts/edm_train.py", *flags(shards, tmp_path / "ranks", 7), ranks=2)
    np.testing.assert_allclose(curve(tmp_path / "ranks"), curve(whole), rtol=1e-4)    # sums in another order


def test_classes_of_a_stream_are_counted_by_a_flag(train, tmp_path, shards, monkeypatch):
    argv = [word for word in flags(shards, tmp_path / "run", 1) if word != "--num_classes"]
    monkeypatch.setattr(sys, "argv", ["edm_train.py", *(word for word in argv if word != "3")])
    script = as_module(ROOT / "scripts/edm_train.py")
    with pytest.raises(UserError, match="is a stream, whose classes are not known before .*: give --num_classes"):
        script.main(script.read_flags())
    logger.reset()
