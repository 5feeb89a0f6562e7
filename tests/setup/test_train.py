"""A training command tells its log the flags, the rows, the grids of samples, and how it ended."""

import json

import numpy as np
import pytest
from PIL import Image

from cm.checkpoints import manifest
from cm.config.flags import Settings, parse
from cm.config.schema import TRAINING_SECTIONS
from cm.distributed import signals
from cm.errors import UserError
from cm.logging import FORMATS, logger
from cm.logging.writers import Writer
from cm.setup.run import check_log_dirs, save_config
from cm.setup.train import train
from support.command_line import overridden
from support.commands import NETWORK, TRAIN


class Heard(Writer):
    """Keeps what it is told."""

    @classmethod
    def open(cls, directory, suffix):
        return cls()

    def __init__(self):
        self.calls = []

    def config(self, flags):
        self.calls.append(("config", flags["lr"]))

    def scalars(self, step, row):
        self.calls.append(("scalars", step, list(row)))

    def images(self, step, name, picture):
        self.calls.append(("images", step, name, picture))

    def close(self, status):
        self.calls.append(("close", status))


@pytest.fixture
def run(tmp_path, monkeypatch, images):
    """Train into a folder with more flags; returns what its log was told."""
    monkeypatch.setitem(FORMATS, "json", Heard)             # in the place of a format that the flag knows
    monkeypatch.setattr(signals, "allow", lambda seconds: None)

    def run(*more):
        words = [*NETWORK, *TRAIN, "--global_batch_size", "4", "--log_formats", "csv,json", "--log_dir", tmp_path,
                 "--data_dir", images, "--num_workers", 0]
        train(parse("", *TRAINING_SECTIONS, training_mode="edm", argv=overridden([*words, *more])))

    return run


def told():
    return next(writer.calls for writer in logger.get_current().writers if isinstance(writer, Heard))


def test_flags_rows_grids_and_the_end(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log")          # over which the flag wins
    run("--total_training_steps", 2, "--sample_interval", 2, "--eval_steps", 2)
    config, first, images, second, end = told()
    assert config == ("config", 1e-3) and end == ("close", "finished")
    assert [call[:2] for call in (first, images, second)] == [("scalars", 1), ("images", 2), ("scalars", 2)]
    assert first[2][:7] == ["step", "samples", "loss", "loss_q0", "loss_q1", "loss_q2", "loss_q3"]
    assert first[2][-3:] == ["lr", "images_per_second", "elapsed_seconds"]
    header, row = (tmp_path / "progress.csv").read_text().splitlines()[:2]
    assert header.split(",") == first[2] and "nan" not in row
    with Image.open(tmp_path / "samples/samples_000002.png") as picture:
        assert np.array_equal(picture.convert("RGB"), images[3]) and images[2] == "samples"
    assert not (tmp_path / "log.txt").exists()

    monkeypatch.setattr(signals, "requested", lambda: 15)
    run("--total_training_steps", 4, "--dropout", 0.1, "--dropout_resolutions", 8)
    assert manifest.newest(str(tmp_path)).config["dropout_resolutions"] == "8", "as every flag of the network"
    assert told()[-1] == ("close", "stopped")
    assert [line.split(",")[0] for line in (tmp_path / "progress.csv").read_text().splitlines()] == [
        "step", "1", "2", "3"
    ]


def test_a_run_that_fails_says_so(run):
    with pytest.raises(UserError, match="nowhere"):
        run("--data_dir", "nowhere")
    assert told()[-1] == ("close", "failed")


def test_a_run_draws_nothing_among_its_images(tmp_path):
    """Its grids of samples would become images of the set, and its folder a class."""
    values = {"data_dir": str(tmp_path), "log_dir": f"{tmp_path}/run", "sample_interval": 5}
    with pytest.raises(UserError, match="--log_dir .* lies in the input folder --data_dir"):
        check_log_dirs(Settings(values, {}))
    check_log_dirs(Settings(values | {"sample_interval": 0}, {}))


def test_another_command_in_the_folder_of_a_run_leaves_its_config(run, tmp_path):
    """It says where the checkpoints of the run are."""
    run("--total_training_steps", 1)
    before = (tmp_path / "config.json").read_text()
    save_config(Settings({"seed": 7}, {}))
    assert (tmp_path / "config.json").read_text() == before
    assert json.loads((tmp_path / "sampling_config.json").read_text()) == {"seed": 7}
    (tmp_path / "config.json").write_text("{}")
    save_config(Settings({"seed": 8}, {}))
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 8}
