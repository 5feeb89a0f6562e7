"""An objective of two trained networks and two optimizers that take turns, written here alone: nothing of the toolkit
knows it. It trains under two ranks, resumes bit for bit, and its result is sampled from.
"""

import csv
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as th

from cm.checkpoints import file_names
from cm.data.loader import load_data
from cm.diffusion.noise_sampling import LogNormalSampler
from cm.distributed import setup as dist
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.objectives.base import ONLINE, Companion, Objective
from cm.objectives.edm import error_terms
from cm.random_util import DeterministicGenerator
from cm.samplers.sample import SampleOptions, sample
from cm.tensors import append_dims
from cm.training.config import CompanionNetwork, LoopConfig, RunParts
from cm.training.loop import TrainLoop
from support.training import digest, network
from support.warm import mpi_program

STEPS, BATCH = 9, 8


@dataclass
class Pair(Objective):
    """The critic learns to denoise what the online network has denoised; that one is drawn to where they agree."""

    companions = (Companion("critic_model", "new", "trained"),)
    updates = {"critic_model": 2, ONLINE: 1}

    weight: object
    noise_distribution: LogNormalSampler = field(default_factory=LogNormalSampler)
    turns: dict = field(default_factory=lambda: {ONLINE: 0, "critic_model": 0})

    @classmethod
    def from_flags(cls, diffusion, values):
        return cls(diffusion.weight)

    def __call__(self, nets, batch, step, rng):
        x0, critic = batch.images, nets.companions["critic_model"].denoise
        sigma = self.noise_distribution.draw(rng, len(x0), x0.device).sigma
        noise = append_dims(sigma, x0.ndim) * rng.randn_like(x0)
        if self.trains(step) == "critic_model":
            with th.no_grad():
                generated = nets.online(x0 + noise, sigma, **batch.cond)
            again = generated + append_dims(sigma, x0.ndim) * rng.randn_like(x0)
            return error_terms(critic(again, sigma, **batch.cond), generated, sigma, self.weight)
        denoised = nets.online(x0 + noise, sigma, **batch.cond)
        with th.no_grad():
            judged = critic(x0 + noise, sigma, **batch.cond)
        return error_terms(denoised, (3 * x0 + judged) / 4, sigma, self.weight)

    def after_step(self, nets, step):
        self.turns[self.trains(step)] += 1
        return False

    def state_dict(self):
        return {"turns": dict(self.turns)}

    def load_state_dict(self, state):
        self.turns = dict(state["turns"])


def data_of(images, ranks, start):
    return load_data(data_dir=images, batch_size=BATCH // ranks, image_size=8, class_cond=True, seed=3, start=start,
                     num_workers=0, rank=dist.get_rank(), world_size=ranks)


def train(images, directory, steps):
    """A run on the ranks there are, resumed if it has begun."""
    ranks = dist.get_world_size()
    logger.configure(str(directory), format_strs=["csv"], rank=dist.get_rank())
    diffusion = KarrasDenoiser(loss_norm="l2")
    config = LoopConfig(batch_size=BATCH // ranks, lr=1e-3, ema_rate="0.5", log_interval=1, save_interval=100,
                        total_training_steps=steps, microbatch=2, use_fp16=False, optimizer="adam")
    parts = RunParts(network(seed=0), diffusion, Pair(diffusion.weight), partial(data_of, images, ranks),
                     {"critic_model": CompanionNetwork(network(seed=1), diffusion)})
    loop = TrainLoop(config, parts)
    loop.resume()
    loop.run_loop()
    logger.reset()
    return loop


def run_on_two_ranks(images, folder):
    """Started by the test under mpiexec."""
    def main():
        dist.setup_dist()
        straight = train(images, folder / "straight", STEPS)
        for steps in (2, 4, STEPS):                         # stopped in the midst of an iteration
            train(images, folder / "stopped", steps)
        if dist.is_main():
            (folder / "turns.json").write_text(json.dumps(straight.objective.turns))

    dist.run(main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=pixels, arr_1=np.arange(20) % 3)
    done = mpi_program(folder, 2, f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_two_trained_networks import run_on_two_ranks
        run_on_two_ranks({str(folder / "images.npz")!r}, Path({str(folder)!r}))
    """, timeout=120)
    assert done.rc == 0, str(done)
    return folder


def losses(directory):
    with open(directory / "progress.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.mpi
def test_both_networks_learn_and_take_their_turns(folder):
    assert json.loads((folder / "turns.json").read_text()) == {ONLINE: 3, "critic_model": 6}
    for name, seed in (("model", 0), ("critic_model", 1)):
        found = th.load(folder / "straight" / file_names.file_name(name, STEPS), weights_only=True)
        moved = [not th.equal(value, found[key]) for key, value in network(seed=seed).state_dict().items()]
        assert any(moved), name
    optimizers = {
        name: th.load(folder / "straight" / file_names.file_name(name, STEPS), weights_only=True)["state"][0]["step"]
        for name in ("opt", "opt_critic_model")
    }
    assert optimizers == {"opt": 3, "opt_critic_model": 6}


@pytest.mark.mpi
def test_a_stopped_run_resumes_bit_for_bit(folder):
    straight = digest(folder / "straight", STEPS)
    assert {"model000009.pt", "critic_model000009.pt", "opt000009.pt", "opt_critic_model000009.pt"} <= set(straight)
    assert digest(folder / "stopped", STEPS) == straight


@pytest.mark.mpi
def test_one_rank_gives_the_same_curve(folder, tmp_path):
    train(str(folder / "images.npz"), tmp_path, STEPS)
    np.testing.assert_allclose(losses(tmp_path), losses(folder / "straight"), rtol=2e-4)


@pytest.mark.mpi
def test_its_result_is_sampled_from(folder):
    model = network(seed=5)
    path = folder / "straight" / file_names.file_name("ema_0.5", STEPS)
    model.load_state_dict(th.load(path, weights_only=True))
    generator = DeterministicGenerator(4, 0)
    images = sample(KarrasDenoiser(loss_norm="l2"), model, (4, 3, 8, 8), SampleOptions(4, Pair.sampler),
                    generator=generator, model_kwargs={"y": th.arange(4) % 3}).images
    assert images.shape == (4, 3, 8, 8) and images.isfinite().all() and images.std() > 0.05


def test_a_missing_companion_is_named(images, tmp_path):
    logger.configure(str(tmp_path), format_strs=[])
    diffusion = KarrasDenoiser(loss_norm="l2")
    config = LoopConfig(batch_size=8, lr=1e-3, ema_rate="0.5", log_interval=1, save_interval=100)
    with pytest.raises(ValueError, match="Pair needs a network named 'critic_model'; given are none"):
        TrainLoop(config, RunParts(network(), diffusion, Pair(diffusion.weight), iter(())))
