"""Train a consistency model (arXiv 2303.01469) by distillation or without a teacher, or run progressive distillation.

mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_distillation --data_dir IMAGES \\
    --teacher_model_path runs/edm/ema_0.9999_600000.pt --log_dir runs/cd
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.schema import FIRST_OF_DISTILLATION, TRAINING_SECTIONS
from cm.distributed import signals


def read_flags() -> Settings:
    return parse(__doc__, *TRAINING_SECTIONS, first=FIRST_OF_DISTILLATION, schedule_sampler="uniform",
                 total_training_steps=600_000)


def main() -> None:
    from cm.setup.train import train

    train(read_flags())


if __name__ == "__main__":
    signals.listen()
    flags = early_exit.parse_or_exit(read_flags)            # before the imports that take seconds
    from cm.distributed import setup as dist

    dist.run(main, flags.values["timeout_seconds"])
