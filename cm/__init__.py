"""Train, distil, sample, edit and evaluate diffusion and consistency models.

    import cm
    pipe = cm.load("runs/cd")
    images = pipe.sample(16, seed=0)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cm.pipeline.pipeline import Pipeline

__version__ = "0.2.0"


def load(
    path: str | os.PathLike[str], *, precision: str = "auto", device: str | torch.device | None = None, **flags: Any
) -> Pipeline:
    """Load a trained model from any format that the toolkit reads.

    :param path: a file of weights, the folder of a run, a safetensors file or a folder that `Pipeline.save` wrote, a
        pickle of EDM, a folder of diffusers, or the URL of a file.
    :param precision: "fp32", "bf16", "fp16", or "auto": bf16 if the hardware is faster with it.
    :param device: where to compute; None: the GPU, if there is one.
    :param flags: flags of image_sample.py about the network, such as image_size=64 if a file of weights does not
        contain it, or verify_weights=False to load a damaged file.
    :return: the model, with methods to sample, edit and save.
    :raises UserError: if there is no such file, it is damaged, or a flag of the network is missing.
    """
    from cm.pipeline.loading import load_pipeline  # torch is slow to import, and --help does not need it

    return load_pipeline(path, precision=precision, device=device, **flags)


def train(log_dir: str | os.PathLike[str], *, training_mode: str = "edm", **flags: Any) -> Pipeline:
    """Train a model in this process, or resume its training, and load it.

    The defaults are those of the commands: of edm_train.py for training_mode="edm", of cm_train.py for any other. A
    call with the same log_dir resumes the run; a finished run is only loaded.

    :param log_dir: folder of the run: its log, checkpoints and sample grids.
    :param training_mode: "edm" for a diffusion model, or the method for a few-step model, such as "ect".
    :param flags: flags of edm_train.py and cm_train.py, such as data_dir="IMAGES", image_size=64,
        total_training_steps=1000, teacher_model_path="runs/edm".
    :return: the average of the weights with the best evaluation of the run, or else the newest average.
    :raises UserError: for a flag that does not exist or cannot be used, and for files that cannot be used.
    """
    from cm.pipeline.training import train_model

    return train_model(log_dir, training_mode=training_mode, **flags)
