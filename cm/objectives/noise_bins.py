"""Loss weights that make the loss equally large at all noise levels, from the past losses of all ranks."""

from __future__ import annotations

import math

import torch as th
from torch import Tensor

BINS = 64
MEMORY = 1000                                               # losses of a bin after which its mean has forgotten most


class NoiseBinWeights:
    """1 / the running mean of the loss in the bin of a noise level.

    The mean starts at 1 and moves towards each loss by a fraction of 1 / MEMORY, as slowly as a learnt weight: the
    first losses of a student that starts as its teacher are 0.

    This is the optimum of a learnt weight exp(w(t)) whose loss is exp(w) L - w (Lu and Song 2024, arXiv 2410.11081,
    equation 8): exp(-w) = E[L | t]. It needs no network, optimizer or gradient, and is saved in checkpoints. It
    satisfies `cm.types.LossHistory`.

    :param sigma_min, sigma_max: ends of the bins, which are equal in ln sigma; levels outside belong to the outer bins.
    """

    def __init__(self, sigma_min: float, sigma_max: float):
        self.low, self.high = math.log(sigma_min), math.log(sigma_max)
        self.means = th.ones(BINS, dtype=th.float64)

    def bins(self, sigma: Tensor) -> Tensor:
        """[N] -> [N] int64 in 0..BINS-1."""
        place = (sigma.double().log() - self.low) / (self.high - self.low)
        return (place * BINS).long().clamp(0, BINS - 1)

    def weight(self, sigma: Tensor) -> Tensor:
        """[N] -> [N] in the dtype of sigma."""
        return (1 / self.means).to(sigma.device, non_blocking=True)[self.bins(sigma)].to(sigma.dtype)

    def update_loss_history(self, sigma: Tensor, loss: Tensor) -> None:
        """Record the unweighted losses of a step, [B] each, in the order of the samples."""
        for place, value in zip(self.bins(sigma).tolist(), loss.double().tolist()):
            self.means[place] += (value - self.means[place]) / MEMORY

    def state_dict(self) -> dict[str, Tensor]:
        """The means, for a checkpoint."""
        return {"means": self.means.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        self.means.copy_(state["means"])
