"""Train a consistency model (arXiv 2303.01469) by distillation or without a teacher, or run progressive distillation.

mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_distillation --data_dir IMAGES \\
    --teacher_model_path runs/edm/ema_0.9999_600000.pt --log_dir runs/cd
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.schema import FIRST_OF_DISTILLATION, TRAINING_SECTIONS


def read_flags() -> Settings:
    """The flags of the command line, with the defaults of this command."""
    return parse(__doc__, *TRAINING_SECTIONS, first=FIRST_OF_DISTILLATION, schedule_sampler="uniform",
                 total_training_steps=600_000)


def main(settings: Settings) -> None:
    """Train on all ranks."""
    from cm.setup.train import train

    train(settings)


if __name__ == "__main__":
    early_exit.run_training(read_flags, main)
