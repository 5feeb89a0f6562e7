"""What tests of several objectives share: levels, weights and networks of the test beds."""

from typing import Any

import torch as th
from torch import nn

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.diffusion.schedules import karras_grid
from cm.objectives.base import Objective
from cm.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from cm.objectives.progdist import ProgressiveDistillation
from cm.setup.model import diffusion_from
from cm.setup.objective import apply_objective_defaults
from cm.types import Batch, Networks
from support.gaussian import Gaussian

F64 = th.float64
GRIDS = [ConsistencyTraining, ConsistencyDistillation, ProgressiveDistillation]


def plain(sigma: th.Tensor) -> th.Tensor:
    return th.ones_like(sigma)


def levels(n: int, device: object = "cpu", dtype: th.dtype = F64) -> th.Tensor:
    return karras_grid(n, device=device, dtype=dtype)


def orthonormal(bed: Gaussian, n: int) -> tuple[Batch, th.Tensor]:
    """Data and noise of n samples whose second moments are the distribution's, exactly: expectations become sums."""
    pattern = th.tensor([[[1.0, 1.0], [-1.0, 1.0]]], dtype=F64).expand(n, 2, 2)
    return Batch(bed.mu + bed.s * pattern), th.tensor([[[1.0, -1.0], [1.0, 1.0]]], dtype=F64).expand(n, 2, 2).clone()


def nets_of(online, target=None, teacher=None) -> Networks:
    empty = nn.Module()
    return Networks(online, empty, target or online, empty, teacher, empty)


def objective_of(kind: type[Objective], *argv: str) -> tuple[Any, dict[str, Any]]:
    """An objective as cm_train.py makes it of flags, and their values."""
    settings = parse("", *TRAINING_SECTIONS, argv=argv, total_training_steps=600_000)
    apply_objective_defaults(settings)
    return kind.from_flags(diffusion_from(settings, kind.distillation), settings.values), settings.values


class Linear(nn.Module):
    """f(x, t_i) = mu + alpha_i (x - mu): one number for each level of a grid."""

    def __init__(self, n: int, mu: float):
        super().__init__()
        self.mu, self.grid = mu, levels(n)
        self.alpha = nn.Parameter(th.ones(n, dtype=F64))

    def forward(self, x, sigma):
        index = (self.grid - sigma[:, None]).abs().argmin(1)
        return self.mu + self.alpha[index][:, None, None] * (x - self.mu)
