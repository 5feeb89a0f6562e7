"""Train a diffusion model: --objective edm (Karras et al., arXiv 2206.00364), cdm, stf or sadpm; see docs/methods.md.

mpiexec -n 8 python scripts/edm_train.py --data_dir IMAGES --image_size 64 --log_dir runs/edm
"""

from __future__ import annotations

from cm import command, stopping
from cm.config import (
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainConfig,
)
from cm.flags import Settings, parse


def read_flags() -> Settings:
    return parse(
        __doc__, ModelConfig, DiffusionConfig, ObjectiveConfig, DataConfig, TrainConfig, EvalConfig, RunConfig
    )


if __name__ == "__main__":                                  # the imports below take seconds
    stopping.listen()
    command.answer(read_flags)

import torch as th

from cm import dist_util, run_data, run_util, script_util
from cm.train_util import TrainLoop
from cm.watchers import check_flags, open_watchers
from evaluations.in_training import open_metric


def main() -> None:
    settings = read_flags()
    settings.replace(training_mode="edm")
    dist_util.setup_dist(settings.values["timeout_seconds"])
    run_util.resolve_durations(settings)
    run_util.adopt_resumed(settings)
    script_util.attend_where_possible(settings)
    script_util.follow_objective(settings)
    script_util.follow_precond(settings)
    check_flags(settings)
    if settings.dry_run:
        return run_util.describe(settings)

    run_util.open_run(settings)
    diffusion = script_util.diffusion_from(settings, distillation=False)
    objective = script_util.objective_from(settings, diffusion)
    data = run_data.open_data(settings, references=objective.references)
    watchers = open_watchers(settings, open_metric)
    th.manual_seed(settings.values["seed"])
    model = run_util.on_device(settings, script_util.model_from(settings))
    TrainLoop(
        model=model,
        diffusion=diffusion,
        data=run_data.augment(settings, data, model),
        objective=objective,
        watchers=watchers,
        **run_util.loop_arguments(settings),
    ).run_loop()


if __name__ == "__main__":
    dist_util.run(main)
