"""Train a diffusion model with the EDM loss (Karras et al., arXiv 2206.00364).

mpiexec -n 8 python scripts/edm_train.py --data_dir IMAGES --image_size 64 --log_dir runs/edm
"""

from __future__ import annotations

import torch as th

from cm import dist_util, run_util, script_util
from cm.config import DataConfig, DiffusionConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from cm.flags import parse
from cm.resample import create_named_schedule_sampler
from cm.train_util import TrainLoop
from cm.watchers import check_flags, open_watchers
from evaluations.in_training import open_metric


def main() -> None:
    settings = parse(__doc__, ModelConfig, DiffusionConfig, DataConfig, TrainConfig, EvalConfig, RunConfig)
    settings.replace(training_mode="edm")
    dist_util.setup_dist()
    if settings.values["resume_checkpoint"]:
        script_util.adopt_checkpoint(settings, "resume_checkpoint")
    script_util.attend_where_possible(settings)
    script_util.follow_precond(settings)
    check_flags(settings)
    if settings.dry_run:
        return run_util.describe(settings)

    run_util.open_log(settings)
    data = run_util.open_data(settings)
    watchers = open_watchers(settings, open_metric)
    th.manual_seed(settings.values["seed"])
    model = script_util.place(script_util.model_from(settings), dist_util.dev())
    diffusion = script_util.diffusion_from(settings, distillation=False)
    TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(settings.values["schedule_sampler"], diffusion),
        watchers=watchers,
        **run_util.loop_arguments(settings),
    ).run_loop()


if __name__ == "__main__":
    dist_util.run(main)
