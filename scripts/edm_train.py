"""Train a diffusion model: --objective edm (Karras et al., arXiv 2206.00364), cdm, stf or sadpm; see docs/methods.md.

mpiexec -n 8 python scripts/edm_train.py --data_dir IMAGES --image_size 64 --log_dir runs/edm
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Settings, parse
from cm.config.schema import FIRST_OF_TRAINING, TRAINING_SECTIONS
from cm.distributed import signals


def read_flags() -> Settings:
    return parse(__doc__, *TRAINING_SECTIONS, first=FIRST_OF_TRAINING, training_mode="edm")


def main() -> None:
    from cm.setup.train import train

    train(read_flags())


if __name__ == "__main__":
    signals.listen()
    flags = early_exit.parse_or_exit(read_flags)            # before the imports that take seconds
    from cm.distributed import setup as dist

    dist.run(main, flags.values["timeout_seconds"])
