"""Weights from a file into a network, or a message that says what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import Tensor, nn

from cm.registry import UserError


def check(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Names and shapes of a state dict must be the network's own.

    :raises UserError: naming the first names and shapes that differ.
    """
    if not isinstance(weights, Mapping):
        raise UserError(f"{source} holds a {type(weights).__name__}, not a dict of tensors")
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    shapes = [
        f"{name} {list(weights[name].shape)} in the file, {list(own[name].shape)} in the network"
        for name in own
        if name in weights and getattr(weights[name], "shape", None) != own[name].shape
    ]
    problems = [
        f"{len(found)} {what}: {', '.join(map(str, found[:3]))}{', ...' if len(found) > 3 else ''}"
        for what, found in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise UserError(f"{source} does not fit this network: {'; '.join(problems)}. Check the model flags.")


@th.no_grad()
def copy_buffers(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Take over what is part of a network but no parameter, such as the random frequencies of NCSN++."""
    for name, buffer in model.named_buffers():
        buffer.copy_(weights[name])


def fit(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Load a state dict into a network that it fits; see `check`."""
    check(model, weights, source)
    model.load_state_dict(weights)


def make(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Give a network on the meta device these tensors, in its own dtypes: no weight is drawn, and none copied."""
    check(model, weights, source)
    model.load_state_dict({name: weights[name].to(own.dtype) for name, own in model.state_dict().items()}, assign=True)
