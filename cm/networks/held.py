"""Values that depend on the weights alone, computed once while a network samples instead of at every pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
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
def weights_held(model: Callable[..., Any]) -> Iterator[None]:
    """While it is entered, the weights do not change, and the modules hold what depends on them alone.

    Nothing is held where gradients are taken, of a compiled network, whose code would be generated once more, of one
    whose weights lie in shards, and of a plain function, whose weights are not known.
    """
    holders = _holders(model) if isinstance(model, nn.Module) and not th.is_grad_enabled() else []
    try:
        for module in holders:
            module.held = module.to_hold()
        yield
    finally:
        for module in holders:
            module.held = None


def _holders(model: nn.Module) -> list[Holds]:
    """The modules that can hold what depends on their weights; none where that would be wrong, or slower."""
    modules = list(model.modules())
    if any(map(_is_compiled, modules)) or not all(map(_is_plain, model.parameters())):
        return []
    return [module for module in modules if isinstance(module, Holds) and module.held is None]


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has made the module run as generated code, in place or as the content of another."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _is_plain(param: nn.Parameter) -> bool:
    """Whether a parameter is no shard, and no other tensor with operations of its own."""
    return type(param) is nn.Parameter
