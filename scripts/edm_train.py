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
    early_exit.parse_or_exit(read_flags)

import torch as th

from cm.distributed import setup as dist
from cm.setup.callbacks import check_flags, open_callbacks
from cm.setup.data import augment, open_data
from cm.setup.model import diffusion_from, drop_unreachable_attention, model_from
from cm.setup.objective import apply_objective_defaults, apply_precond_defaults, objective_from
from cm.setup.run import dry_run, inherit_resumed, loop_arguments, on_device, resolve_durations, start_run
from cm.training.consistency import TrainLoop
from evaluations.in_training import open_metric


def main() -> None:
    settings = read_flags()
    settings.replace(training_mode="edm")
    dist.setup_dist(settings.values["timeout_seconds"])
    resolve_durations(settings)
    inherit_resumed(settings)
    drop_unreachable_attention(settings)
    apply_objective_defaults(settings)
    apply_precond_defaults(settings)
    check_flags(settings)
    if settings.dry_run:
        return dry_run(settings)

    start_run(settings)
    diffusion = diffusion_from(settings, distillation=False)
    objective = objective_from(settings, diffusion)
    data = open_data(settings, references=objective.references)
    callbacks = open_callbacks(settings, open_metric)
    th.manual_seed(settings.values["seed"])
    model = on_device(settings, model_from(settings))
    TrainLoop(
        model=model,
        diffusion=diffusion,
        data=augment(settings, data, model),
        objective=objective,
        callbacks=callbacks,
        **loop_arguments(settings),
    ).run_loop()


if __name__ == "__main__":
    dist.run(main)
