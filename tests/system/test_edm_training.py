"""EDM's networks in the scripts, under real mpiexec: train, sample, as a pickle, distil, sample."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as th

from cm.checkpoints import manifest
from cm.data.loader import load_data
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.networks.edm import SongUNet
from cm.script_util import create_model
from cm.train_util import TrainLoop
from support import edm_pickles
from support.as_module import as_module
from support.warm import mpiexec

ROOT = Path(__file__).resolve().parents[2]
NETWORK = {"arch": "ddpmpp", "image_size": 8, "num_channels": 16, "num_res_blocks": 1, "channel_mult": "1,2",
           "attention_resolutions": "4", "augment_dim": 9, "class_cond": True}


def script(name, **flags):
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    done = mpiexec(2, [str(ROOT / "scripts" / name), *words], timeout=120, env={"OPENAI_LOG_FORMAT": "log,csv"})
    assert done.rc == 0, done


def sample(model_path, log_dir, **flags):
    script("image_sample.py", model_path=model_path, log_dir=log_dir, num_samples=5, batch_size=3, **flags)
    return np.load(log_dir / "samples_5x8x8x3.npz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps of a tiny DDPM++ on two ranks, which is told how its images were augmented."""
    folder = tmp_path_factory.mktemp("ddpmpp")
    script("edm_train.py", **NETWORK, data_dir="digits", augment=0.12, global_batch_size=8, lr=1e-3, ema_rate=0.5,
           total_training_steps=3, log_interval=1, log_dir=folder)
    return folder


@pytest.fixture(scope="module")
def pickled(trained):
    """The averaged weights of that run as the pickle that NVlabs/edm would have written of them."""
    model = create_model(**NETWORK, num_classes=10)
    model.load_state_dict(th.load(trained / "ema_0.5_000003.pt", weights_only=True))
    arguments = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 10, "augment_dim": 9,
                 "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    return edm_pickles.dump(trained / "net.pkl", edm_pickles.net_of(model, arguments))


@pytest.mark.mpi
def test_a_pickle_samples_as_the_run_that_it_comes_from(trained, pickled, tmp_path):
    """No flag tells the network; the same weights in both files give the same bytes."""
    config = manifest.read(str(trained / "checkpoint_000003.json")).config
    assert (config["arch"], config["precond"]) == ("ddpmpp", "edm")
    own = sample(trained / "ema_0.5_000003.pt", tmp_path / "own", steps=3, precision="bf16")
    foreign = sample(pickled, tmp_path / "foreign", steps=3, precision="bf16")
    assert np.array_equal(own["arr_0"], foreign["arr_0"]) and np.array_equal(own["arr_1"], foreign["arr_1"])
    assert json.loads((tmp_path / "own" / "samples_5x8x8x3.json").read_text())["network_evaluations"] == 5


@pytest.mark.mpi
def test_a_pickle_is_a_teacher(pickled, tmp_path):
    """Student and target have its architecture and start from its weights; the result samples in one step."""
    script("cm_train.py", teacher_model_path=pickled, data_dir="digits", random_flip=False, loss_norm="l2",
           global_batch_size=8, total_training_steps=2, start_ema=0.9, start_scales=6, weight_schedule="uniform",
           lr=1e-5, ema_rate=0.5, log_dir=tmp_path / "cd")
    checkpoint = manifest.newest(str(tmp_path / "cd"))
    assert (checkpoint.step, checkpoint.config["arch"]) == (2, "ddpmpp")
    model = create_model(**NETWORK, num_classes=10)
    model.load_state_dict(th.load(checkpoint.path("target_model"), weights_only=True))
    teacher = th.load(pickled.parent / "ema_0.5_000003.pt", weights_only=True)
    # Two steps of RAdam at 1e-5 move no weight far from the teacher's.
    assert all((value - teacher[name]).abs().max() < 1e-3 for name, value in model.state_dict().items())
    images = sample(checkpoint.path("ema_0.5"), tmp_path / "onestep", sampler="onestep")["arr_0"]
    assert images.shape == (5, 8, 8, 3) and images.std() > 0


@pytest.mark.mpi
def test_ect_starts_from_the_weights_of_a_pickle(pickled, tmp_path, monkeypatch):
    """In this process: with a learning rate of 0 the student is still the teacher, whose clock needs no warning."""
    flags = dict(training_mode="ect", teacher_model_path=pickled, data_dir="digits", random_flip=False, lr=0,
                 global_batch_size=8, total_training_steps=1, stage_steps=1, ema_rate=0.5, log_dir=tmp_path / "ect")
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["cm_train.py", *words])
    script = as_module(ROOT / "scripts" / "cm_train.py")
    script.main(script.read_flags())
    logger.reset()
    checkpoint = manifest.newest(str(tmp_path / "ect"))
    assert (checkpoint.config["arch"], checkpoint.config["training_mode"]) == ("ddpmpp", "ect")
    teacher = th.load(pickled.parent / "ema_0.5_000003.pt", weights_only=True)
    student = th.load(checkpoint.path("model"), weights_only=True)
    assert student.keys() == teacher.keys() and all(th.equal(student[name], teacher[name]) for name in teacher)
    assert "clock" not in (tmp_path / "ect" / "log.txt").read_text()


# --- constants that are no parameters --------------------------------------------------------------------------------


@pytest.fixture
def loop(tmp_path):
    """(seed of the network, options) -> a loop over a tiny NCSN++."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)

    def make(seed, folder, **options):
        logger.configure(str(folder), format_strs=["csv"])
        th.manual_seed(seed)
        model = create_model(8, 16, 1, "1", attention_resolutions="", arch="ncsnpp")
        data = partial(stream, data_dir=str(tmp_path / "images.npz"))
        return TrainLoop(model=model, diffusion=KarrasDenoiser(time_scale=1.0), data=data, batch_size=4, lr=1e-3,
                         ema_rate="0.5", log_interval=1, save_interval=100, total_training_steps=1, **options)

    yield make
    logger.reset()


def stream(start, data_dir):
    return load_data(data_dir=data_dir, batch_size=4, image_size=8, start=start, num_workers=0)


@pytest.mark.parametrize("how", ["resumed", "started from an average", "started from converted weights"])
def test_the_frequencies_of_ncsnpp_come_with_the_weights(loop, tmp_path, how):
    """They are random, and belong to the network that was trained with them: however another run comes by it."""
    first = loop(0, tmp_path / "a")
    first.run_loop()
    frequencies = first.model.map_noise.freqs.clone()
    (tmp_path / "converted").mkdir()
    manifest.save(str(tmp_path / "converted"), 0, {"model": first.model.state_dict()}, {}, 0)
    folder, options = {
        "resumed": ("a", {}),
        "started from an average": ("b", {"resume_checkpoint": str(tmp_path / "a" / "ema_0.5_000001.pt")}),
        "started from converted weights": ("b", {"resume_checkpoint": str(tmp_path / "converted" / "model000000.pt")}),
    }[how]
    second = loop(1, tmp_path / folder, **options)
    assert th.equal(second.model.map_noise.freqs, frequencies)
    assert isinstance(second.model, SongUNet) and second.step == (1 if how == "resumed" else 0)
