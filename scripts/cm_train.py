"""Train a consistency model (arXiv 2303.01469): by distillation from a teacher, alone, or by progressive distillation.

mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_distillation --data_dir IMAGES \\
    --teacher_model_path runs/edm/ema_0.9999_600000.pt --log_dir runs/cd
"""

from __future__ import annotations

from cm import command, stopping
from cm.config import (
    CONSISTENCY_MODES,
    ConsistencyConfig,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from cm.flags import Settings, parse


def read_flags() -> Settings:
    return parse(
        __doc__, ModelConfig, DiffusionConfig, DataConfig, TrainConfig, ConsistencyConfig, EvalConfig, RunConfig,
        schedule_sampler="uniform", total_training_steps=600_000,
    )


if __name__ == "__main__":                                  # the imports below take seconds
    stopping.listen()
    command.answer(read_flags)

import torch as th

from cm import dist_util, run_data, run_util, script_util
from cm.checkpoints import weights
from cm.lpips import prepare_lpips
from cm.registry import UserError
from cm.train_util import CMTrainLoop
from cm.watchers import check_flags, open_watchers
from evaluations.in_training import open_metric


def main() -> None:
    settings = read_flags()
    dist_util.setup_dist(settings.values["timeout_seconds"])
    run_util.resolve_durations(settings)
    config = settings.section(ConsistencyConfig)
    if config.training_mode != "consistency_training" and not config.teacher_model_path:
        raise UserError(f"--training_mode {config.training_mode} needs a teacher: give --teacher_model_path")
    if config.teacher_model_path:
        script_util.adopt_checkpoint(settings, "teacher_model_path")
    run_util.adopt_resumed(settings)
    teacher = settings.sources.get("teacher_model_path")
    if teacher and teacher.training_mode in CONSISTENCY_MODES:
        raise UserError(f"--teacher_model_path {teacher.path} is a consistency model; a teacher is a diffusion model")
    script_util.attend_where_possible(settings)
    ema_scale_fn = script_util.create_ema_and_scales_fn(
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
        return run_util.describe(settings)

    if config.loss_norm == "lpips":
        dist_util.on_main(prepare_lpips)
    run_util.open_run(settings)
    data = run_data.open_data(settings)
    watchers = open_watchers(settings, open_metric)
    th.manual_seed(settings.values["seed"])
    model = script_util.model_from(settings)
    teacher_model = teacher_diffusion = None
    if teacher:
        teacher_model = script_util.model_from(settings, dropout=config.teacher_dropout)
        weights.fit(teacher_model, teacher.take(), teacher.path)
        model.load_state_dict(teacher_model.state_dict())       # the student starts from its teacher
        run_util.on_device(settings, teacher_model).eval()
        teacher_diffusion = script_util.diffusion_from(settings, distillation=False)
    target_model = None
    if config.training_mode != "progdist":
        target_model = script_util.model_from(settings)
        target_model.load_state_dict(model.state_dict())
        run_util.on_device(settings, target_model)

    CMTrainLoop(
        model=run_util.on_device(settings, model),
        target_model=target_model,
        teacher_model=teacher_model,
        teacher_diffusion=teacher_diffusion,
        training_mode=config.training_mode,
        ema_scale_fn=ema_scale_fn,
        diffusion=script_util.diffusion_from(settings, config.training_mode != "progdist", config.loss_norm),
        data=run_data.augment(settings, data, model),
        watchers=watchers,
        **run_util.loop_arguments(settings),
    ).run_loop()


if __name__ == "__main__":
    dist_util.run(main)
