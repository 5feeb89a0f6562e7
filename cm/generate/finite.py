"""Images with pixels that are NaN or infinite: counted over all ranks, refused unless they are allowed."""

from __future__ import annotations

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch import Tensor

from cm.distributed import setup as dist
from cm.errors import UserError
from cm.logging import logger


def finite_images(images: Tensor) -> NDArray[np.bool_]:
    """Which of the images [N,C,H,W] have finite pixels only: [N]."""
    return images.isfinite().flatten(1).all(1).cpu().numpy()


class NonFiniteCount:
    """The images of all ranks that are not finite, in one drawing.

    :param allowed: let them pass with a warning.
    """

    def __init__(self, allowed: bool):
        self._allowed = allowed
        self._here = np.zeros(2, np.int64)                  # non-finite images and all images since the last `check`
        self._total = np.zeros(2, np.int64)                 # the same of all ranks, up to the last `check`

    def add(self, finite: NDArray[np.bool_]) -> None:
        """Count the images of this rank that `finite_images` told apart."""
        self._here += (int((~finite).sum()), len(finite))

    def check(self) -> None:
        """Sum over the ranks. All ranks must call it together.

        :raises UserError: on every rank, if an image is not finite and that is not allowed.
        """
        self._total += dist.all_reduce_sum(th.from_numpy(self._here.copy())).numpy()
        self._here[:] = 0
        if self._total[0] and not self._allowed:
            raise UserError(f"{self._message()} Nothing of them is written; --allow_non_finite True writes them anyway")

    def warn(self) -> None:
        """Log a warning with the count, if there are any."""
        if self._total[0]:
            logger.warn(self._message())

    def _message(self) -> str:
        bad, drawn = self._total
        return (f"{bad} of {drawn} images drawn are not finite (NaN or infinite pixels, which become black). The "
                "likely reasons are weights with NaN, as a failed training leaves them, or an overflow in fp16: try "
                "--precision fp32 or bf16, or another checkpoint.")
