"""A network that is trained: float32 masters, an optimizer, and gradients averaged over the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch as th
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cm.distributed import setup as dist
from cm.training.mixed_precision import MixedPrecisionTrainer
from cm.training.optimizer import ZeroOptimizer

Optimizer = th.optim.Optimizer | ZeroOptimizer


class TrainedNetwork:
    """One network with what training it needs.

    :param trainer: its masters and precision.
    :param make_optimizer: from master parameters to a fresh optimizer of them.
    """

    def __init__(self, trainer: MixedPrecisionTrainer, make_optimizer: Callable[[list[Tensor]], Optimizer]):
        self.trainer, self.make_optimizer = trainer, make_optimizer
        self.model = trainer.model
        self.opt = make_optimizer(trainer.master_params)
        self.ddp_model: nn.Module = self.model
        self.ddp_warmed_up = True

    def reset_optimizer(self) -> None:
        """Forget what the optimizer has learnt."""
        self.opt = self.make_optimizer(self.trainer.master_params)

    def distribute(self) -> None:
        """From now on average the gradients of all ranks while the backward pass runs.

        All ranks must hold the same weights.
        """
        ranks = dist.get_world_size()
        if ranks == 1:
            return
        device = next(self.model.parameters()).device
        shared = DistributedDataParallel(
            self.model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True,
        )
        # Buffers are constants, the same on every rank from the start. (As an argument, newer torch deprecates it.)
        shared.broadcast_buffers = False
        self.ddp_model = shared
        self.ddp_warmed_up = ranks <= 2

    def no_sync(self) -> AbstractContextManager:
        """While this is open, gradients of a microbatch stay on their rank."""
        ddp = self.ddp_model
        return ddp.no_sync() if isinstance(ddp, DistributedDataParallel) else contextlib.nullcontext()
