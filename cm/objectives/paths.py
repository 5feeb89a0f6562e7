"""Paths of an image through the noise levels: along a teacher's ODE, or along the line of its own noise.

Both use the line x = data + sigma noise, whose slope dx/dsigma is the noise. The data and the noise are either the
teacher's denoised image and the noise that it predicts in x, or the sample's own image and the noise that was added.
Averaged over the images that could have become x, the second pair is the first.

Shapes: N batch, C channels, H and W height and width. Times are noise levels: t > r.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch as th
from torch import Tensor

from cm.diffusion.denoiser import Diffusion
from cm.errors import UserError
from cm.objectives.base import TEACHER, Companion, Objective
from cm.registry import lookup
from cm.samplers.euler import Euler
from cm.samplers.heun import Heun
from cm.tensors import append_dims
from cm.types import Batch, Denoiser, Networks


class Path(ABC):
    """A way of the images of a batch through the noise levels."""

    companions: ClassVar[tuple[Companion, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    """The flags that it uses."""

    def solved_by(self, solver: str) -> Path:
        """The path with a solver for its ODE, if it has one."""
        return self

    @abstractmethod
    def ends(self, nets: Networks, batch: Batch, noise: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(data, noise) of the line through x [N,C,H,W] at levels sigma [N]: [N,C,H,W] each."""

    @abstractmethod
    def follow(self, nets: Networks, batch: Batch, noise: Tensor, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The image at levels r > 0 on the path through x_t: [N,C,H,W]."""

    def data(self, nets: Networks, batch: Batch, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The image at level 0 of the line through x_t."""
        return self.ends(nets, batch, noise, x_t, t)[0]


TEACHER_SOLVERS: dict[str, type[Heun] | type[Euler]] = {"heun": Heun, "euler": Euler}
"""--teacher_solver -> the sampler of a teacher's step."""


@dataclass(frozen=True)
class TeacherPath(Path):
    """Along the teacher's probability-flow ODE.

    :param solver: "heun", two evaluations of the teacher, or "euler", one, which needs a finer grid for the same error
        (Song et al. 2023, arXiv 2303.01469, figure 3b).
    """

    companions = (TEACHER,)
    options = ("teacher_solver",)

    solver: str = "heun"

    def solved_by(self, solver: str) -> Path:
        lookup(TEACHER_SOLVERS, solver, "teacher_solver")
        return TeacherPath(solver)

    def ends(self, nets: Networks, batch: Batch, noise: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised = teacher_of(nets, batch)(x, sigma)
        return denoised, (x - denoised) / append_dims(sigma, x.ndim)

    def follow(self, nets: Networks, batch: Batch, noise: Tensor, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """One step of the solver."""
        return TEACHER_SOLVERS[self.solver]().step(teacher_of(nets, batch), x_t, t, r, None)


class NoisePath(Path):
    """Along the noise that was added to the sample: an unbiased estimate of the ODE's slope, without a teacher."""

    def ends(self, nets: Networks, batch: Batch, noise: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return batch.images, noise

    def follow(self, nets: Networks, batch: Batch, noise: Tensor, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """x0 + r z, exactly."""
        return batch.images + noise * append_dims(r, noise.ndim)


def teacher_of(nets: Networks, batch: Batch) -> Denoiser:
    """The teacher's denoiser with the conditioning of a batch; objectives evaluate the teacher through it.

    :raises UserError: if there is none.
    """
    if nets.teacher is None:
        raise UserError("consistency distillation needs a teacher: give a teacher_model")
    return partial(nets.teacher, **batch.cond)


PATHS: dict[str, Path] = {"teacher": TeacherPath(), "noise": NoisePath()}


def image_at(
    path: Path, nets: Networks, batch: Batch, noise: Tensor, x_t: Tensor, t: Tensor, r: Tensor, reaches_zero: bool
) -> Tensor:
    """The image at levels r on the path through x_t; at r = 0, it is the data of the line, for any solver.

    :param reaches_zero: whether r may be 0.
    """
    if not reaches_zero:
        return path.follow(nets, batch, noise, x_t, t, r)
    data = path.data(nets, batch, noise, x_t, t)
    above = path.follow(nets, batch, noise, x_t, t, th.where(r > 0, r, t))
    return th.where(append_dims(r > 0, x_t.ndim), above, data)


@dataclass
class PathObjective(Objective):
    """A few-step objective whose target uses the velocity of a path, `velocity_path`.

    :param diffusion: the scalings around the network.
    :param path: a name in PATHS.
    """

    usual_path: ClassVar[str]
    """The default of --pair_path."""
    few_step = True
    needs_slow_clock = True
    full_precision_passes = True

    diffusion: Diffusion
    path: str

    def __post_init__(self) -> None:
        self.velocity_path = lookup(PATHS, self.path, "pair_path")
        self.companions = self.velocity_path.companions

    @classmethod
    def path_of(cls, values: Mapping[str, Any]) -> str:
        """The name of the path that flags choose."""
        return values.get("pair_path") or cls.usual_path

    @classmethod
    def companions_of(cls, values: Mapping[str, Any]) -> tuple[Companion, ...]:
        return lookup(PATHS, cls.path_of(values), "pair_path").companions
