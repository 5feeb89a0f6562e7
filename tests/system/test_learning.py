"""Real learning on real digits, small enough for a test: distillation beats its own start and training alone."""

import numpy as np
import pytest
import torch as th

from cm.config.schema import TrainConfig
from cm.data.loader import load_data
from cm.data.sources import open_source
from cm.generate.engine import SamplingPlan, draw
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.objectives.curricula import ema_and_scales
from cm.samplers.sample import SampleOptions
from cm.script_util import create_model
from cm.train_util import CMTrainLoop, TrainLoop
from cm.training.ema import EMA
from cm.training.loop import as_batch
from evaluations.metrics.frechet import Moments, frechet_distance

BATCH = 32
SAMPLES = 300


def network():
    th.manual_seed(0)
    model = create_model(
        8, 32, 1, "1,2", class_cond=True, num_classes=10, attention_resolutions="4", num_head_channels=32,
        use_scale_shift_norm=True,
    )
    return model.to(memory_format=th.channels_last)


def digits(start):
    return load_data(
        data_dir="digits", batch_size=BATCH, image_size=8, class_cond=True, random_flip=False, start=start,
        num_workers=0,
    )


def moments(images):
    """Mean and covariance of grey pixels, [N,8,8,3] uint8 -> [64], [64,64]."""
    pixels = Moments(64)
    pixels.update(images.mean(-1).reshape(len(images), -1) / 127.5 - 1)
    return pixels.finalize()


def distance(model, diffusion, sampler, steps):
    """Frechet distance of samples from the real digits, in pixels."""
    source = open_source("digits", 8)
    rng = np.random.default_rng(0)
    labels = source.labels[rng.choice(len(source), SAMPLES)]
    plan = SamplingPlan(SAMPLES, SAMPLES, 8, seed=0, num_classes=10)
    images, *_ = draw(model, diffusion, plan, np.arange(SAMPLES), labels, SampleOptions(steps, sampler))
    return frechet_distance(*moments(source.images(np.arange(len(source)))), *moments(images))


def consistency_run(tmp_path, mode, teacher, steps):
    """One-step distances at the start and at the end."""
    logger.configure(str(tmp_path / mode), format_strs=["csv"])
    diffusion = KarrasDenoiser(loss_norm="l2", distillation=True, weight_schedule="uniform")
    model, target = network(), network()
    if teacher is not None:
        model.load_state_dict(teacher.state_dict())
        target.load_state_dict(teacher.state_dict())
    start = distance(model, diffusion, sampler="onestep", steps=1)
    training = CMTrainLoop(
        model=model, target_model=target, teacher_model=teacher, teacher_diffusion=KarrasDenoiser(loss_norm="l2"),
        training_mode=mode, ema_scale_fn=ema_and_scales("fixed", 0.8, "fixed", 12, 12, steps, 1), diffusion=diffusion,
        data=digits, batch_size=BATCH, lr=1e-3, ema_rate="0.9", log_interval=50, save_interval=10_000,
        total_training_steps=steps,
    )
    training.run_loop()
    training.trainer.load_master_params(training.ema_params[0])
    return start, distance(model, diffusion, sampler="onestep", steps=1)


@pytest.fixture(autouse=True)
def close_the_log():
    yield
    logger.reset()


def test_distillation_beats_its_start_and_training_alone(tmp_path):
    logger.configure(str(tmp_path / "edm"), format_strs=["csv"])
    teacher, diffusion = network(), KarrasDenoiser(loss_norm="l2")
    untrained = distance(teacher, diffusion, sampler="heun", steps=8)
    TrainLoop(
        model=teacher, diffusion=diffusion, data=digits, batch_size=BATCH, lr=2e-3, ema_rate="0.9", log_interval=50,
        save_interval=10_000, total_training_steps=220,
    ).run_loop()
    trained = distance(teacher, diffusion, sampler="heun", steps=8)
    start, distilled = consistency_run(tmp_path, "consistency_distillation", teacher, 70)
    _, alone = consistency_run(tmp_path, "consistency_training", None, 50)
    print(f"teacher {untrained:.2f} -> {trained:.2f}; distilled {start:.2f} -> {distilled:.2f}; alone {alone:.2f}")
    assert trained < 0.5 * untrained
    assert distilled < 0.6 * start
    assert distilled < alone


def test_the_averages_of_a_short_run_show_beginnings_of_images(tmp_path):
    """60 steps with the scripts' default average, against the original's, which still holds the noise of the start, and
    against a network that was never trained.
    """
    logger.configure(str(tmp_path / "short"), format_strs=["csv"])
    model, diffusion = network(), KarrasDenoiser(loss_norm="l2")
    training = TrainLoop(
        model=model, diffusion=diffusion, data=digits, batch_size=BATCH, lr=2e-3, ema_rate=TrainConfig.ema_rate,
        ema_rampup_ratio=TrainConfig.ema_rampup_ratio, log_interval=50, save_interval=10_000, total_training_steps=60,
    )
    original = EMA(training.trainer.master_params, [TrainConfig.ema_rate])
    untrained = distance(model, diffusion, sampler="euler", steps=6)
    for _ in range(60):
        training.run_step(as_batch(next(training.data), training.images_seen, 0, 1))
        original.update([float(TrainConfig.ema_rate)])
    found = []
    for average in (training.ema_params[0], original.local[0]):
        training.trainer.load_master_params(average)
        found.append(distance(model, diffusion, sampler="euler", steps=6))
    print(f"untrained {untrained:.2f}; with warm-up {found[0]:.2f}, without {found[1]:.2f}")
    assert found[0] < 0.5 * untrained
    assert found[1] > 0.8 * untrained
    assert training.averages.initial_weight == [0] and original.initial_weight[0] > 0.9
