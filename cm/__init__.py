"""Train, distil, sample, edit and evaluate diffusion and consistency models.

    import cm
    pipe = cm.load("runs/cd")
    images = pipe.sample(16, seed=0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cm.pipeline.pipeline import Pipeline

__version__ = "0.1.0"


def load(path: str, **options: Any) -> Pipeline:
    """A trained model of any format that the toolkit reads; see `cm.pipeline.loading.load_pipeline`.

    :param path: a file of weights, the folder of a run, a pickle of EDM, a folder of diffusers, or an address of one.
    """
    from cm.pipeline.loading import load_pipeline  # torch is slow to import, and --help does without it

    return load_pipeline(path, **options)
