"""What networks compute from their weights alone, computed once while they sample instead of at every pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch import nn


class Holds(nn.Module):
    """A module that can compute in advance what depends on its weights alone.

    Its `forward` uses `held` unless that is None.
    """

    held: Any = None

    @abstractmethod
    def to_hold(self) -> Any:
        """What depends on the weights alone; None if it cannot be had in advance."""


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """While it is entered, the weights do not change, and the modules hold what depends on them alone.

    Nothing is held where gradients are taken, of a compiled network, whose code would be generated once more, and of
    one whose weights lie in shards.
    """
    modules = list(model.modules())
    holders = [m for m in modules if isinstance(m, Holds) and m.held is None]
    if th.is_grad_enabled() or any(map(_is_compiled, modules)) or not all(map(_is_plain, model.parameters())):
        holders = []
    try:
        for module in holders:
            module.held = module.to_hold()
        yield
    finally:
        for module in holders:
            module.held = None


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has made the module run as generated code, in place or as the content of another."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _is_plain(param: nn.Parameter) -> bool:
    """Whether a parameter is no shard, and no other tensor with operations of its own."""
    return type(param) is nn.Parameter
