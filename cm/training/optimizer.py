"""Optimizers by name, whole on every rank or sharded over the ranks."""

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

OPTIMIZERS = {"radam": th.optim.RAdam, "adam": th.optim.Adam, "adamw": th.optim.AdamW}
FUSED = ("adam", "adamw")                                   # whose step torch has as one operation, and where
FUSED_ON = ("cpu", "cuda")


class RankOptimizer:
    """What a rank steps with: an optimizer of the part of the parameters that is its own."""

    def __init__(self, inner: th.optim.Optimizer, params: Sequence[Tensor]):
        self.inner, self.params = inner, list(params)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of this rank; a learning rate set here on every rank is that of all parameters."""
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self.inner.state

    def step(self) -> None:
        self.inner.step()


class ZeroOptimizer(RankOptimizer):
    """An optimizer whose every rank keeps the state of some parameters, and steps for all ranks with those.

    This is the first stage of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), with whole tensors: parameters, state
    and files are the same, bit for bit, as without it. Every method but `load_state_dict` is one step of all ranks
    together. All ranks must hold the same gradients.
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
        """That of the same optimizer without shares, on rank 0, on the CPU; empty on the others."""
        entries = [self.inner.state.get(param, {}) for param in self.own]
        names = dist.all_gather_object([list(entry) for entry in entries])
        values = dist.gather_tensors([value for entry in entries for value in entry.values()])
        if values is None:
            return {}
        names, values = [iter(each) for each in names], [iter(each) for each in values]
        # A file spells a word out once per string object that holds it: interned, these are torch's own.
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
        """Take this rank's share of what an optimizer of all parameters has saved, with shares or without.

        :raises ValueError: if it was saved of other parameters.
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
    """An optimizer of this rank's rows of all parameters, whose state has the same layout.

    `state_dict` is one step of all ranks together; files are those of an optimizer of whole parameters.
    """

    def __init__(self, inner: th.optim.Optimizer, params: Sequence[Tensor], layout: Layout):
        super().__init__(inner, params)
        self.layout = layout

    def state_dict(self) -> dict[str, Any]:
        """That of an optimizer of whole parameters, on rank 0, on the CPU; empty on the others."""
        saved, state = self.inner.state_dict(), {}
        for index, entry in saved["state"].items():
            wholes = {sys.intern(name): self._whole(index, value) for name, value in entry.items()}
            if dist.is_main():
                state[index] = {name: whole.cpu() for name, whole in wholes.items()}
        return {"state": state, "param_groups": saved["param_groups"]} if dist.is_main() else {}

    def _whole(self, index: int, value: Tensor) -> Tensor:
        return self.layout.whole(index, value) if self.is_divided(index, value) else value

    def is_divided(self, index: int, value: Tensor) -> bool:
        """Whether it has a number for each of the parameter's, as the count of steps has not."""
        return value.ndim == self.params[index].ndim > 0

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take this rank's rows of what an optimizer of whole parameters has saved."""
        state = {
            index: {
                name: self.layout.part(index, value) if self.is_divided(index, value) else value[...]
                for name, value in entry.items()
            } for index, entry in saved["state"].items()
        }
        self.inner.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


Optimizer = th.optim.Optimizer | ZeroOptimizer | ShardedOptimizer


def read(entry: dict[str, Any]) -> dict[str, Any]:
    """What is saved of one parameter, read where it is not yet."""
    return {name: value if isinstance(value, (int, float)) else value[...] for name, value in entry.items()}


def make_optimizer(
    name: str, params: Sequence[Tensor], lr: float, weight_decay: float, shares: Sharding | None = None,
    layout: Layout = WHOLE, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
) -> Optimizer:
    """An entry of `OPTIMIZERS`; with `shares` of more than one rank, in shares of whole tensors.

    :param layout: of what network the parameters are rows.
    :param betas, eps: decay rates of the two moments, and what is added to the root of the second (Kingma and Ba 2014,
        arXiv 1412.6980, algorithm 1).
    :raises UserError: for a name that is none.
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


def decay(step: int, decay_steps: int) -> float:
    """The factor of a learning rate that falls as 1 / sqrt(step) after so many steps; 1 where that is 0.

    Karras et al. 2023 (EDM2, arXiv 2312.02696), equation 67.
    """
    return min(1.0, (decay_steps / max(step, 1)) ** 0.5) if decay_steps else 1.0


def rampup(images_seen: int, rampup_kimg: float) -> float:
    """The factor of a learning rate that rises linearly from 0 over so many thousand images; 1 where that is 0."""
    return min(1.0, images_seen / (1000 * rampup_kimg)) if rampup_kimg else 1.0
