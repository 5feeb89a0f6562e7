"""Weights in the formats of other programs; `FORMATS` lists those that say themselves what network they are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from cm.checkpoints.formats import described, diffusers, edm_pickle, hub_folder
from cm.registry import Table


class Format(NamedTuple):
    """How weights of another program are known and read."""

    claims: Callable[[str], bool]
    """Whether the file or folder at a path is of this format, by its name or what is in it; asked on one rank."""
    read: Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]
    """The model flags that a file holds, and its weights by the names of the network; called on every rank."""


FORMATS: Table[Format] = Table("format of weights", {
    "EDM pickle": Format(lambda path: path.endswith(".pkl"), edm_pickle.read_path),
    "diffusers folder": Format(diffusers.is_folder, diffusers.read),
    "safetensors with its network": Format(described.claims, described.read),
    "model folder": Format(hub_folder.is_folder, hub_folder.read),
})
"""In the order in which they are asked; what none of them claims is a file of weights, with a manifest or bare."""
