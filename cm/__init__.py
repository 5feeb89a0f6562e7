"""Train, distil, sample, edit and evaluate diffusion and consistency models.

    import cm
    pipe = cm.load("runs/cd")
    images = pipe.sample(16, seed=0)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cm.pipeline.pipeline import Pipeline

__version__ = "0.2.0"


def load(path: str | os.PathLike[str], **options: Any) -> Pipeline:
    """Load a trained model from any format that the toolkit reads.

    :param path: a file of weights, the folder of a run, a safetensors file or a folder that `Pipeline.save` wrote, a
        pickle of EDM, a folder of diffusers, or the URL of a file.
    :param options: see `cm.pipeline.loading.load_pipeline`: precision, device, and flags of the network.
    :return: the model, with methods to sample, edit and save.
    :raises UserError: if there is no such file, it is damaged, or neither the file nor an option has a flag of the
        network that is needed.
    """
    from cm.pipeline.loading import load_pipeline  # torch is slow to import, and --help does without it

    return load_pipeline(path, **options)


def train(log_dir: str | os.PathLike[str], **flags: Any) -> Pipeline:
    """Train a model in this process, or resume its training, and load it.

    :param log_dir: folder of the run.
    :param flags: see `cm.pipeline.training.train_model`: training_mode, and those of edm_train.py and cm_train.py.
    :return: the average of the weights with the best evaluation of the run, or else the newest average.
    :raises UserError: for a flag that does not exist or cannot be used, and for files that cannot be used.
    """
    from cm.pipeline.training import train_model

    return train_model(log_dir, **flags)
