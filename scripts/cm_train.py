"""Train a consistency model (arXiv 2303.01469) by distillation or without a teacher, or run progressive distillation.

mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_distillation --data_dir IMAGES \\
    --teacher_model_path runs/edm/ema_0.9999_600000.pt --log_dir runs/cd
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.schema import (
    CONSISTENCY_MODES,
    ConsistencyConfig,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from cm.distributed import signals


def read_flags() -> Settings:
    return parse(
        __doc__, ModelConfig, DiffusionConfig, DataConfig, TrainConfig, ConsistencyConfig, EvalConfig, RunConfig,
        schedule_sampler="uniform", total_training_steps=600_000,
    )


if __name__ == "__main__":                                  # the imports below take seconds
    signals.listen()
    early_exit.parse_or_exit(read_flags)

import torch as th

from cm.checkpoints import loading
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.objectives.curricula import ema_and_scales
from cm.objectives.lpips import prepare_lpips
from cm.setup.callbacks import check_flags, open_callbacks
from cm.setup.data import augment, open_data
from cm.setup.inherit import inherit_checkpoint
from cm.setup.model import diffusion_from, drop_unreachable_attention, model_from
from cm.setup.run import dry_run, inherit_resumed, loop_arguments, on_device, resolve_durations, start_run
from cm.training.consistency import CMTrainLoop
from evaluations.in_training import open_metric


def main() -> None:
    settings = read_flags()
    dist.setup_dist(settings.values["timeout_seconds"])
    resolve_durations(settings)
    config = settings.section(ConsistencyConfig)
    if config.training_mode != "consistency_training" and not config.teacher_model_path:
        raise UserError(f"--training_mode {config.training_mode} needs a teacher: give --teacher_model_path")
    if config.teacher_model_path:
        inherit_checkpoint(settings, "teacher_model_path")
    inherit_resumed(settings)
    teacher = settings.sources.get("teacher_model_path")
    if teacher and teacher.training_mode in CONSISTENCY_MODES:
        raise UserError(f"--teacher_model_path {teacher.path} is a consistency model; a teacher is a diffusion model")
    drop_unreachable_attention(settings)
    ema_scale_fn = ema_and_scales(
        target_ema_mode=config.target_ema_mode,
        start_ema=config.start_ema,
        scale_mode=config.scale_mode,
        start_scales=config.start_scales,
        end_scales=config.end_scales,
        total_steps=settings.values["total_training_steps"],
        distill_steps_per_iter=config.distill_steps_per_iter,
    )
    check_flags(settings)
    if settings.dry_run:
        return dry_run(settings)

    if config.loss_norm == "lpips":
        dist.on_main(prepare_lpips)
    start_run(settings)
    data = open_data(settings)
    callbacks = open_callbacks(settings, open_metric)
    th.manual_seed(settings.values["seed"])
    model = model_from(settings)
    teacher_model = teacher_diffusion = None
    if teacher:
        teacher_model = model_from(settings, dropout=config.teacher_dropout)
        loading.fit(teacher_model, teacher.take(), teacher.path)
        model.load_state_dict(teacher_model.state_dict())       # the student starts from its teacher
        on_device(settings, teacher_model).eval()
        teacher_diffusion = diffusion_from(settings, distillation=False)
    target_model = None
    if config.training_mode != "progdist":
        target_model = model_from(settings)
        target_model.load_state_dict(model.state_dict())
        on_device(settings, target_model)

    CMTrainLoop(
        model=on_device(settings, model),
        target_model=target_model,
        teacher_model=teacher_model,
        teacher_diffusion=teacher_diffusion,
        training_mode=config.training_mode,
        ema_scale_fn=ema_scale_fn,
        diffusion=diffusion_from(settings, config.training_mode != "progdist", config.loss_norm),
        data=augment(settings, data, model),
        callbacks=callbacks,
        **loop_arguments(settings),
    ).run_loop()


if __name__ == "__main__":
    dist.run(main)
