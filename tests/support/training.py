"""Small training runs for tests of the loop."""

import hashlib
from functools import partial

import torch as th

from cm.data.loader import load_data
from cm.diffusion.noise_sampling import create_named_schedule_sampler
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.objectives.curricula import ema_and_scales
from cm.script_util import create_model
from cm.train_util import CMTrainLoop, TrainLoop

BATCH = 8


def network(seed=0, dropout=0.0):
    th.manual_seed(seed)
    model = create_model(8, 32, 1, "1", class_cond=True, num_classes=3, attention_resolutions="8",
                         num_head_channels=32, dropout=dropout)
    for name, param in model.named_parameters():            # published networks start at 0 in places: here all count
        if param.detach().abs().sum() == 0 and name.endswith("weight"):
            th.nn.init.normal_(param, std=0.05)
    return model


def loop(images, directory, steps, *, mode="edm", dropout=0.0, curriculum=None, **options):
    logger.configure(str(directory), format_strs=["csv"])
    data = partial(stream, images=images)
    common = dict(
        model=network(dropout=dropout), data=data, batch_size=BATCH, lr=1e-3, ema_rate="0.5,0.9", log_interval=1,
        save_interval=100, total_training_steps=steps, config={"image_size": 8},
    ) | options
    if mode == "edm":
        return TrainLoop(diffusion=KarrasDenoiser(loss_norm="l2"), **common)
    target = None if mode == "progdist" else network(dropout=dropout)
    teacher = None if mode == "consistency_training" else network(seed=1)
    curriculum = curriculum or ema_and_scales("fixed", 0.9, "fixed", 6, 6, steps, 1)
    return CMTrainLoop(
        target_model=target, teacher_model=teacher, teacher_diffusion=KarrasDenoiser(loss_norm="l2"),
        training_mode=mode, ema_scale_fn=curriculum,
        diffusion=KarrasDenoiser(loss_norm="l2", distillation=mode != "progdist", weight_schedule="uniform"), **common,
    )


def stream(start, images):
    return load_data(
        data_dir=images, batch_size=BATCH, image_size=8, class_cond=True, seed=3, start=start, num_workers=0
    )


def run(*args, **kwargs):
    training = loop(*args, **kwargs)
    training.run_loop()
    return training


def digest(directory, step):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob(f"*{step:06d}.pt")}


def second_moment():
    return create_named_schedule_sampler("loss-second-moment", KarrasDenoiser(loss_norm="l2"))


PROGDIST = ema_and_scales("fixed", 0.0, "progdist", 4, 4, 8, 2)
MODES = {
    "edm": {},
    "edm with loss-second-moment": {"schedule_sampler": None},
    "edm with dropout, microbatches and decay": {"dropout": 0.3, "microbatch": 4, "lr_anneal_steps": 20},
    "consistency_distillation": {"dropout": 0.2},
    "consistency_training": {},
    "progdist": {"curriculum": PROGDIST},
}
