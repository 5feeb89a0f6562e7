"""Train a diffusion model: --objective edm (arXiv 2206.00364), cdm, stf, sadpm or uncertainty; see docs/methods.md.

mpiexec -n 8 python scripts/edm_train.py --data_dir IMAGES --image_size 64 --log_dir runs/edm
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.schema import FIRST_OF_TRAINING, TRAINING_SECTIONS


def read_flags() -> Settings:
    """The flags of the command line, with the defaults of this command."""
    return parse(__doc__, *TRAINING_SECTIONS, first=FIRST_OF_TRAINING, training_mode="edm")


def main(settings: Settings) -> None:
    """Train on all ranks."""
    from cm.setup.train import train

    train(settings)


if __name__ == "__main__":
    early_exit.run_training(read_flags, main)
