"""Loading the weights of a file, read once, into a network; errors say what does not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import Tensor, nn

from cm.checkpoints import dcp, file_names, manifest
from cm.checkpoints.formats import FORMATS, ddim_unet
from cm.data.class_names import ClassNames
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage


def check(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Compare names and shapes of a state dict with those of a network.

    :raises UserError: naming the first names and shapes that differ.
    """
    ddim_unet.refuse(weights, source)
    if not isinstance(weights, Mapping):
        raise UserError(f"{source} contains a {type(weights).__name__}, not a dict of tensors")
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
    """Copy what is part of a network but no parameter, such as the random frequencies of NCSN++."""
    for name, buffer in model.named_buffers():
        buffer.copy_(weights[name][...])


def fit(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Load a state dict into a network.

    :raises UserError: if it does not fit, see `check`.
    """
    check(model, weights, source)
    model.load_state_dict(weights)


def make(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Give a network on the meta device these tensors, in its own dtypes: none is initialized first, and none copied.

    :raises UserError: if they do not fit, see `check`.
    """
    check(model, weights, source)
    model.load_state_dict({name: weights[name].to(own.dtype) for name, own in model.state_dict().items()}, assign=True)


@dataclass
class WeightsFile:
    """A file of weights; it holds them if they had to be read already to know the network."""

    path: str
    training_mode: str | None = None                        # what the network was trained as, where that is known
    levels: int | None = None                               # of its training, where that is known and they were fixed
    weights: Mapping[str, Tensor] | None = None
    class_names: ClassNames = ()                            # of the classes that it knows, where that is known
    expected: Mapping[str, Any] | None = None               # its size and CRC-32, of which `take` makes sure

    def take(self) -> Mapping[str, Tensor]:
        """The weights, on every rank; only rank 0 reads a file, and every rank a folder.

        To be called once: no copy is kept here.

        :raises UserError: on every rank, if the file cannot be loaded, or is not the one that its manifest lists.
        """
        if self.weights is None:
            if self.path.endswith(dcp.SUFFIX):
                return dist.everywhere(read_folder, self.path, self.expected)
            return dist.load_state_dict(self.path, expected=self.expected)
        weights, self.weights = self.weights, None
        return weights


def read_folder(folder: str, facts: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of a folder into which several ranks have written.

    :param facts: what its manifest lists for it; None to compare nothing.
    :raises UserError: if it is damaged.
    """
    return dict(dcp.whole(dcp.open_part(folder, facts, verify=facts is not None)))


def look_at(path: str) -> tuple[str, manifest.Checkpoint | None]:
    """The kind of file at a path, empty if there is none, and the manifest next to it; for one rank."""
    if not storage.exists(path):
        return "", None
    kind = format_of(path) or "file of weights"
    return kind, None if os.path.isdir(path) and not file_names.parse_name(path) else manifest.beside(path)


def format_of(path: str) -> str:
    """The name in `FORMATS` of what is at a path; empty for weights of this toolkit. For one rank."""
    return next((name for name, each in FORMATS.items() if each.claims(path)), "")
