"""Train a diffusion model: --objective edm (Karras et al., arXiv 2206.00364), cdm, stf or sadpm; see docs/methods.md.

mpiexec -n 8 python scripts/edm_train.py --data_dir IMAGES --image_size 64 --log_dir runs/edm
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.schema import (
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainConfig,
)
from cm.distributed import signals


def read_flags() -> Settings:
    return parse(
        __doc__, ModelConfig, DiffusionConfig, ObjectiveConfig, DataConfig, TrainConfig, EvalConfig, RunConfig
    )


if __name__ == "__main__":                                  # the imports below take seconds
    signals.listen()
    early_exit.answer(read_flags)

import torch as th

from cm.distributed import setup as dist
from cm.setup.callbacks import check_flags, open_watchers
from cm.setup.data import augment, open_data
from cm.setup.model import attend_where_possible, diffusion_from, model_from
from cm.setup.objective import follow_objective, follow_precond, objective_from
from cm.setup.run import adopt_resumed, describe, loop_arguments, on_device, open_run, resolve_durations
from cm.training.consistency import TrainLoop
from evaluations.in_training import open_metric


def main() -> None:
    settings = read_flags()
    settings.replace(training_mode="edm")
    dist.setup_dist(settings.values["timeout_seconds"])
    resolve_durations(settings)
    adopt_resumed(settings)
    attend_where_possible(settings)
    follow_objective(settings)
    follow_precond(settings)
    check_flags(settings)
    if settings.dry_run:
        return describe(settings)

    open_run(settings)
    diffusion = diffusion_from(settings, distillation=False)
    objective = objective_from(settings, diffusion)
    data = open_data(settings, references=objective.references)
    watchers = open_watchers(settings, open_metric)
    th.manual_seed(settings.values["seed"])
    model = on_device(settings, model_from(settings))
    TrainLoop(
        model=model,
        diffusion=diffusion,
        data=augment(settings, data, model),
        objective=objective,
        watchers=watchers,
        **loop_arguments(settings),
    ).run_loop()


if __name__ == "__main__":
    dist.run(main)
