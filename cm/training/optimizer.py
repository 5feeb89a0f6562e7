"""Optimizers by name, whole on every rank or sharded over the ranks, and their learning rate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch as th
from torch import Tensor

from cm.distributed import setup as dist
from cm.distributed.layout import WHOLE, Layout
from cm.distributed.sharding import Sharding
from cm.registry import lookup
from cm.training.config import LoopConfig

OPTIMIZERS = {"radam": th.optim.RAdam, "adam": th.optim.Adam, "adamw": th.optim.AdamW}
FUSED, FUSED_ON = ("adam", "adamw"), ("cpu", "cuda")        # optimizers and devices with a fused step in torch


class RankOptimizer:
    """The part of an optimizer on one rank, which updates the parameters that this rank owns."""

    def __init__(self, inner: th.optim.Optimizer, params: Sequence[Tensor]):
        self.inner, self.params = inner, list(params)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups on this rank. Set a learning rate on every rank, so that it applies to all parameters."""
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self.inner.state

    def step(self) -> None:
        self.inner.step()


class ZeroOptimizer(RankOptimizer):
    """Each rank keeps the optimizer state of some parameters, updates these, and sends them to the other ranks.

    This is stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), with whole tensors: parameters, state and files
    are the same, bit for bit, as without it. All ranks must hold the same gradients, and must call every method but
    `load_state_dict` together.
    """

    def __init__(
        self, kind: Callable[..., th.optim.Optimizer], params: Sequence[Tensor], shares: Sharding, **options: Any
    ):
        self.shares, self.own = shares, shares.mine(list(params))
        super().__init__(kind([{"params": self.own}], **options), params)

    def step(self) -> None:
        super().step()
        for rank in range(self.shares.ranks):
            dist.sync_params(self.shares.of(rank, self.params), rank)

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the same optimizer without sharding: on rank 0, on the CPU; empty on the other ranks."""
        entries = [self.inner.state.get(param, {}) for param in self.own]
        names = dist.all_gather_object([list(entry) for entry in entries])
        values = dist.gather_tensors([value for entry in entries for value in entry.values()])
        if values is None:
            return {}
        names, values = [iter(each) for each in names], [iter(each) for each in values]
        # A pickle writes equal words once per string object. Interned words make the file the same as torch's own.
        state = {
            index: {sys.intern(name): next(values[owner]) for name in next(names[owner])}
            for index, owner in enumerate(self.shares.owners)
        }
        places = list(range(len(self.params)))
        return {
            "state": {index: entry for index, entry in state.items() if entry},
            "param_groups": [group | {"params": places} for group in self.inner.state_dict()["param_groups"]],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load this rank's share of the state dict of an optimizer, sharded or not.

        :raises ValueError: if it belongs to another number of parameters.
        """
        groups = saved["param_groups"]
        if [len(group["params"]) for group in groups] != [len(self.params)]:
            raise ValueError(f"the saved optimizer is not one of {len(self.params)} parameters in one group")
        places = self.shares.mine(groups[0]["params"])
        self.inner.load_state_dict({
            "state": {own: read(saved["state"][place]) for own, place in enumerate(places) if place in saved["state"]},
            "param_groups": [groups[0] | {"params": list(range(len(places)))}],
        })


class ShardedOptimizer(RankOptimizer):
    """An optimizer of this rank's rows of all parameters (FSDP). Its state is sharded in the same way.

    All ranks must call `state_dict` together. The files are the same as those of an optimizer of whole parameters.
    """

    def __init__(self, inner: th.optim.Optimizer, params: Sequence[Tensor], layout: Layout):
        super().__init__(inner, params)
        self.layout = layout

    def state_dict(self) -> dict[str, Any]:
        """The state dict of an optimizer of whole parameters: on rank 0, on the CPU; empty on the other ranks."""
        saved, state = self.inner.state_dict(), {}
        for index, entry in saved["state"].items():
            wholes = {sys.intern(name): self._whole(index, value) for name, value in entry.items()}
            if dist.is_main():
                state[index] = {name: whole.cpu() for name, whole in wholes.items()}
        return {"state": state, "param_groups": saved["param_groups"]} if dist.is_main() else {}

    def _whole(self, index: int, value: Tensor) -> Tensor:
        return self.layout.whole(index, value) if self.is_divided(index, value) else value

    def is_divided(self, index: int, value: Tensor) -> bool:
        """Whether this part of the state has one number per element of the parameter; the step count has not."""
        return value.ndim == self.params[index].ndim > 0

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load this rank's rows from the state dict of an optimizer of whole parameters."""
        state = {
            index: {
                name: self.layout.part(index, value) if self.is_divided(index, value) else value[...]
                for name, value in entry.items()
            } for index, entry in saved["state"].items()
        }
        self.inner.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


Optimizer = th.optim.Optimizer | ZeroOptimizer | ShardedOptimizer


def read(entry: dict[str, Any]) -> dict[str, Any]:
    """The saved state of one parameter, with all tensors read from their file."""
    return {name: value if isinstance(value, (int, float)) else value[...] for name, value in entry.items()}


def make_optimizer(
    name: str, params: Sequence[Tensor], lr: float, weight_decay: float, shares: Sharding | None = None,
    layout: Layout = WHOLE, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
) -> Optimizer:
    """A new optimizer of a kind in `OPTIMIZERS`.

    :param shares: which rank keeps the state of which parameter (`ZeroOptimizer`); None: every rank keeps all.
    :param layout: how the parameters are divided into rows among the ranks (`ShardedOptimizer`).
    :param betas: decay rates of the first and second moments (Kingma and Ba 2014, arXiv 1412.6980, algorithm 1).
    :param eps: number added to the square root of the second moment.
    :raises UserError: for a name that is not in `OPTIMIZERS`.
    """
    kind = lookup(OPTIMIZERS, name, "optimizer")
    settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    if name in FUSED and all(param.device.type in FUSED_ON for param in params):
        kind = partial(kind, fused=True)
    if layout.is_sharded:
        return ShardedOptimizer(kind(params, **settings), params, layout)
    if shares is None or shares.ranks == 1:
        return kind(params, **settings)
    return ZeroOptimizer(kind, params, shares, **settings)


def learning_rate(config: LoopConfig, step: int, images_seen: int) -> float:
    """The learning rate of a step: config.lr, with its warm-up, its linear decrease to 0 and its decay."""
    done = step / config.lr_anneal_steps if config.lr_anneal_steps else 0.0
    rate = config.lr * max(0.0, 1.0 - done) * rampup(images_seen, config.lr_rampup_kimg)
    return rate * decay(step, config.lr_decay_steps)


def decay(step: int, decay_steps: int) -> float:
    """The factor of a learning rate that falls as 1 / sqrt(step) after `decay_steps` steps; 1 if that is 0.

    Karras et al. 2023 (EDM2, arXiv 2312.02696), equation 67.
    """
    return min(1.0, (decay_steps / max(step, 1)) ** 0.5) if decay_steps else 1.0


def rampup(images_seen: int, rampup_kimg: float) -> float:
    """The factor of a learning rate that rises linearly from 0 over `rampup_kimg` thousand images; 1 if that is 0."""
    return min(1.0, images_seen / (1000 * rampup_kimg)) if rampup_kimg else 1.0
