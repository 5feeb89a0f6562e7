"""A network that is trained: float32 masters, an optimizer, and gradients averaged over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from cm.training.engine import Engine
from cm.training.mixed_precision import MixedPrecisionTrainer
from cm.training.optimizer import Optimizer

SETTINGS = ("weight_decay", "betas", "eps")
"""Settings in the file of an optimizer that a resumed run may change; the learning rate is set at each step."""


class TrainedNetwork:
    """One network, with its optimizer and its precision.

    :param trainer: its master parameters and precision.
    :param make_optimizer: makes a new optimizer for master parameters.
    :param engine: how the run is divided among ranks.
    """

    def __init__(
        self, trainer: MixedPrecisionTrainer, make_optimizer: Callable[[list[Tensor]], Optimizer], engine: Engine
    ):
        self.trainer, self.make_optimizer, self.engine = trainer, make_optimizer, engine
        self.model = trainer.model
        self.opt = make_optimizer(trainer.master_params)
        self.ddp_model: nn.Module = self.model
        self.ddp_warmed_up = True

    def load_optimizer(self, saved: dict[str, Any]) -> None:
        """Restore the state of an optimizer, with the settings of this run."""
        settings = [{name: group[name] for name in SETTINGS} for group in self.opt.param_groups]
        self.opt.load_state_dict(saved)
        for group, own in zip(self.opt.param_groups, settings, strict=True):
            group.update(own)

    def reset_optimizer(self) -> None:
        """Reset the state of the optimizer."""
        self.opt = self.make_optimizer(self.trainer.master_params)

    def distribute(self) -> None:
        """From now on average the gradients of all ranks while the backward pass runs.

        All ranks must hold the same weights.
        """
        self.ddp_model = self.engine.wrap(self.model)
        self.ddp_warmed_up = not self.engine.needs_warm_up()

    def no_sync(self) -> AbstractContextManager:
        """A context in which the gradients of a microbatch are not averaged over the ranks."""
        return self.engine.no_sync(self.ddp_model)
