"""What the objectives on a grid of noise levels share: consistency and progressive distillation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cm.objectives.curricula import Curriculum
from cm.objectives.distances import Distance
from cm.types import Batch, LossTerms, Networks, NoiseSource


@dataclass
class GridObjective(ABC):
    """A loss over one interval, drawn uniformly, of a grid whose fineness the curriculum decides.

    :param curriculum: step -> (target decay rate, num_scales).
    :param levels: (number, device, dtype) -> that many falling noise levels.
    :param weight: the loss weight at noise levels, [N] -> [N].
    :param distance: two batches of images -> [N].
    """

    history: ClassVar[None] = None

    curriculum: Curriculum
    levels: Callable[..., Tensor]
    weight: Callable[[Tensor], Tensor]
    distance: Distance

    @abstractmethod
    def intervals(self, num_scales: int) -> int:
        """How many intervals the loss is over; ValueError if num_scales leaves none."""

    @abstractmethod
    def terms(self, nets: Networks, batch: Batch, noise: Tensor, index: Tensor, num_scales: int) -> LossTerms:
        """The loss of given noise [N,C,H,W] over the intervals `index` [N]; 0 is the noisiest."""

    def __call__(self, nets: Networks, batch: Batch, step: int, rng: NoiseSource) -> LossTerms:
        _, num_scales = self.curriculum(step)
        noise = rng.randn_like(batch.images)
        index = rng.randint(0, self.intervals(num_scales), (len(batch),), device=noise.device)
        return self.terms(nets, batch, noise, index, num_scales)
