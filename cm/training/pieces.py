"""The part of a training loop's state that each rank writes, where all ranks write; see `cm.checkpoints.share_writer`.

What every rank holds completely is written by one of them; all ranks have about the same amount to write.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch as th
from torch import Tensor

from cm.checkpoints.dcp import Piece, Stored
from cm.distributed import setup as dist
from cm.distributed.layout import Layout
from cm.distributed.sharding import Sharding
from cm.training.master_weights import MasterWeights
from cm.training.optimizer import Optimizer, RankOptimizer, ShardedOptimizer, ZeroOptimizer

STATE = "state"                                             # the beginning of the names in an optimizer's part


def of_network(owner: MasterWeights, tensors: Sequence[Tensor], shares: Sharding) -> dict[str, Piece]:
    """This rank's pieces of a state dict.

    :param tensors: what this rank holds of the masters, or of an average of them: all, or its share of whole tensors.
    :param shares: who writes which of those that are whole.
    """
    names = [name for name, _ in owner.model.named_parameters()]
    pieces = {names[place]: piece for place, piece in _of_params(owner.layout, tensors, shares)}
    if dist.is_main():
        others = {name: value for name, value in owner.model.state_dict().items() if name not in names}
        pieces |= {name: Piece(value, value.shape) for name, value in others.items()}
    return pieces


def _of_params(layout: Layout, tensors: Sequence[Tensor], shares: Sharding) -> Iterator[tuple[int, Piece]]:
    places = list(range(len(shares.owners)))
    if not layout.is_sharded:
        held = tensors if len(tensors) < len(places) else shares.mine(tensors)
        places, tensors = shares.mine(places), held
    for place, tensor in zip(places, tensors, strict=True):
        if found := layout.place_of(place, tensor):
            yield place, Piece(tensor, *found)


def of_optimizer(opt: Optimizer, layout: Layout, shares: Sharding) -> dict[str, Piece]:
    """This rank's pieces of the state of an optimizer; their names are "state.12.exp_avg" and such."""
    pieces = {}
    for place, entry in local_state(opt).items():
        if not layout.is_sharded and shares.owners[place] != shares.rank:
            continue
        for name, value in entry.items():
            whole = not isinstance(opt, ShardedOptimizer) or not opt.is_divided(place, value)
            found = (value.shape, 0) if whole else layout.place_of(place, value)
            if found and (dist.is_main() or not (whole and layout.is_sharded)):
                pieces[f"{STATE}.{place}.{name}"] = Piece(value, *found)
    return pieces


def local_state(opt: Optimizer) -> dict[int, dict[str, Tensor]]:
    """Place of a parameter -> what this rank's optimizer remembers of it."""
    state = _inner(opt).state_dict()["state"]
    if isinstance(opt, ZeroOptimizer):
        places = opt.shares.mine(range(len(opt.params)))
        return {places[own]: entry for own, entry in state.items()}
    return state


def groups_of(opt: Optimizer) -> list[dict[str, Any]]:
    """The settings of an optimizer of all parameters."""
    groups = _inner(opt).state_dict()["param_groups"]
    if isinstance(opt, RankOptimizer):                      # which numbers its own parameters
        return [group | {"params": list(range(len(opt.params)))} for group in groups]
    return groups


@th.no_grad()
def lay_out_as_params(opt: Optimizer) -> None:
    """Give the loaded state of an optimizer the memory format of its parameters; a folder has none."""
    for param, entry in _inner(opt).state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == param.shape and value.stride() != param.stride():
                entry[name] = th.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)


def _inner(opt: Optimizer) -> th.optim.Optimizer:
    return opt.inner if isinstance(opt, RankOptimizer) else opt


def optimizer_state(part: Mapping[str, Stored], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict of an optimizer of whole parameters, from a folder; its tensors are read later."""
    state: dict[int, dict[str, Stored]] = {}
    for key, stored in part.items():
        _, place, name = key.split(".", 2)
        state.setdefault(int(place), {})[sys.intern(name)] = stored
    return {"state": dict(sorted(state.items())), "param_groups": groups}
