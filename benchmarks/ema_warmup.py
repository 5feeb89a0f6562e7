"""Measure how soon a weight average gives good images with different warm-ups: Frechet distance of samples of digits.

python benchmarks/ema_warmup.py --log_dir runs/ema_warmup

One diffusion model is trained on scikit-learn's digits; its averages have the same rate, but different
warm-ups: none, a half-life of at most 0.05 of the images seen (EDM, --ema_rampup_ratio 0.05), and the rate
min(r, (1 + k) / (10 + k)) after k steps. The distance compares means and covariances of the pixels with those of all
digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th
from torch import nn

from cm.config.flags import option, parse
from cm.data.loader import load_data
from cm.data.sources import open_source
from cm.distributed import setup as dist
from cm.generate.engine import SamplingPlan, draw
from cm.io.storage import write_json
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.networks.build import NetworkConfig, build_network
from cm.objectives.edm import EDM
from cm.samplers.sample import SampleOptions
from cm.training.config import LoopConfig, RunParts
from cm.training.ema import EMA
from cm.training.ema_rates import EmaRate
from cm.training.loop import TrainLoop, as_batch
from evaluations.metrics.frechet import Moments, frechet_distance

BATCH = 128


@dataclass(frozen=True)
class WarmupConfig:
    """warm-up"""

    ema_rate: str = option("0.999", "decay rate of every average")
    at: str = option("60,200,868", "steps after which samples are measured, comma-separated")
    num_samples: int = option(500, "images per measurement", minimum=2)
    seed: int = option(0, "seed of the network, of training and of the samples", minimum=0)
    log_dir: str = option("ema_warmup", "folder for the results")


def main() -> None:
    config = parse(__doc__ or "", WarmupConfig).section(WarmupConfig)
    logger.configure(config.log_dir, format_strs=["csv"])
    steps = [int(word) for word in config.at.split(",")]
    loop = open_loop(config.seed, max(steps))
    rules = {
        "none": lambda k: float(config.ema_rate),
        "0.05 of the images": lambda k: EmaRate(config.ema_rate, 0.05).decay(k * BATCH, BATCH),
        "(1 + k) / (10 + k)": lambda k: min(float(config.ema_rate), (1 + k) / (10 + k)),
    }
    averages = EMA(loop.trainer.master_params, list(rules))
    rows = []
    while loop.step < max(steps):
        loop.run_step(as_batch(next(loop.data), loop.images_seen, 0, 1))
        averages.update([rule(loop.step - 1) for rule in rules.values()])
        if loop.step in steps:
            tried = {"the weights themselves": loop.trainer.master_params} | dict(zip(rules, averages.local))
            for name, params in tried.items():
                distance = measure(loop, params, config)
                rows.append({"step": loop.step, "average": name, "distance": round(distance, 3)})
                print(rows[-1], flush=True)
    write_json(Path(config.log_dir) / "ema_warmup.json", {"ema_rate": config.ema_rate, "rows": rows})


def open_loop(seed: int, steps: int) -> TrainLoop:
    """The teacher of the demo, ready for its first step."""
    model, diffusion = network(seed), KarrasDenoiser(loss_norm="l2")
    loop_config = LoopConfig(
        batch_size=BATCH, lr=2e-3, ema_rate="0.999", log_interval=10**6, save_interval=10**6, seed=seed,
        total_training_steps=steps,
    )
    def data(start: int):
        return load_data(
            data_dir="digits", batch_size=BATCH, image_size=8, class_cond=True, random_flip=False, seed=seed,
            start=start, num_workers=0,
        )

    loop = TrainLoop(loop_config, RunParts(model, diffusion, EDM(diffusion.weight), data))
    loop.resume()
    return loop


def network(seed: int) -> nn.Module:
    th.manual_seed(seed)
    return build_network(NetworkConfig(
        image_size=8, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="4",
        num_head_channels=32, class_cond=True, num_classes=10,
    ))


def measure(loop: TrainLoop, params, config: WarmupConfig) -> float:
    """The Frechet distance of samples that a network with these parameters draws."""
    model = network(config.seed).eval()
    with th.no_grad():
        for own, value in zip(model.parameters(), params, strict=True):
            own.copy_(value)
    source, rows = open_source("digits", 8), np.arange(config.num_samples)
    labels = source.labels[np.random.default_rng(config.seed).choice(len(source), len(rows))]
    plan = SamplingPlan(len(rows), len(rows), 8, seed=config.seed, num_classes=10)
    images = draw(model, loop.diffusion, plan, rows, labels, SampleOptions(18, "heun")).images
    return frechet_distance(*moments(source.images(np.arange(len(source)))), *moments(images))


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N,8,8,3] uint8 -> mean [64] and covariance [64,64] of the grey pixels."""
    pixels = Moments(64)
    pixels.update(images.mean(-1).reshape(len(images), -1) / 127.5 - 1)
    return pixels.finalize()


if __name__ == "__main__":
    dist.run(main)
