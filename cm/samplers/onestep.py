"""One evaluation, from pure noise to an image: Song et al. 2023 (Consistency Models, arXiv 2303.01469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch as th
from torch import Tensor

from cm.samplers.euler import Euler


@dataclass(frozen=True)
class OneStep(Euler):
    """f(x_T, sigma_max), whatever the number of steps asked for. Its only step is Euler's last one."""

    accepts_churn: ClassVar[bool] = False
    uses_rho: ClassVar[bool] = False
    uses_steps: ClassVar[bool] = False

    def grid(self, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        return th.tensor([sigma_max, 0.0], dtype=th.float64)
