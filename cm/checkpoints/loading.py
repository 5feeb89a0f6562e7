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
    """Copy the buffers of a network, such as the random frequencies of NCSN++."""
    for name, buffer in model.named_buffers():
        buffer.copy_(weights[name][...])


def fit(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Load a state dict into a network.

    :raises UserError: if it does not fit, see `check`.
    """
    check(model, weights, source)
    model.load_state_dict(weights)


def make(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Use these tensors as the weights of a network on the meta device, in its own dtypes, without copies.

    :raises UserError: if they do not fit, see `check`.
    """
    check(model, weights, source)
    model.load_state_dict({name: weights[name].to(own.dtype) for name, own in model.state_dict().items()}, assign=True)


@dataclass
class WeightsFile:
    """A file of weights, with what is known of its network."""

    path: str
    training_mode: str | None = None                        # how the network was trained; None: not known
    levels: int | None = None                               # noise levels of training, if they were a fixed number
    weights: Mapping[str, Tensor] | None = None             # if the file had to be read to know the network
    class_names: ClassNames = ()                            # of the network's classes; empty: not known
    expected: Mapping[str, Any] | None = None               # size and CRC-32 of the file, which `take` checks

    def take(self) -> Mapping[str, Tensor]:
        """The weights, on every rank. Rank 0 reads a file; every rank reads a folder.

        Call it once: no copy is kept.

        :raises UserError: on every rank, if the file cannot be loaded, or differs from its entry in the manifest.
        """
        if self.weights is None:
            if self.path.endswith(dcp.SUFFIX):
                return dist.everywhere(read_folder, self.path, self.expected)
            return dist.load_state_dict(self.path, expected=self.expected)
        weights, self.weights = self.weights, None
        return weights


def read_folder(folder: str, facts: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of a folder to which several ranks have written.

    :param facts: its entry in the manifest, to compare it with; None: compare nothing.
    :raises UserError: if it is damaged.
    """
    return dict(dcp.whole(dcp.open_part(folder, facts, verify=facts is not None)))


def look_at(path: str) -> tuple[str, manifest.Checkpoint | None]:
    """The format of the file at a path, empty without a file, and the manifest next to it. Call it on one rank."""
    if not storage.exists(path):
        return "", None
    kind = format_of(path) or "file of weights"
    return kind, None if os.path.isdir(path) and not file_names.parse_name(path) else manifest.beside(path)


def format_of(path: str) -> str:
    """The name in `FORMATS` of the format of a path; empty for weights of this toolkit. Call it on one rank."""
    return next((name for name, each in FORMATS.items() if each.claims(path)), "")
