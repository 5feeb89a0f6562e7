"""The interface of an extractor: a network that turns images into features, behind one call.

Shapes: N images, H and W height and width, D pooled features, S spatial features (flattened), K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch import Tensor

from cm.errors import UserError

INCEPTION_HEAD = (1008, 2048)                               # the classes and features of Inception-v3 of 2015-12-05
ID_DIGITS = 12                                              # of the SHA-256 in an extractor's identity


class Features(NamedTuple):
    """The output of an extractor for N images; None for outputs that it does not have."""

    pool: NDArray[np.float32]                               # [N,D]
    spatial: NDArray[np.float32] | None                     # [N,S]
    logits: NDArray[np.float32] | None                      # [N,K]; Inception's without the last layer's bias


class Extractor(Protocol):
    """A network that turns images into features."""

    @property
    def id(self) -> str:
        """The kind, with a hash of the weights and of the preprocessing of images; stored with statistics."""
        ...

    @property
    def name(self) -> str:
        """The name in results and messages."""
        ...

    @property
    def resize(self) -> str:
        """A description of the resizing of the images."""
        ...

    @property
    def is_inception(self) -> bool:
        """Whether these are the features of published FIDs."""
        ...

    def extract(self, images: NDArray[np.uint8]) -> Features:
        """Features of images [N,H,W,3], values 0 to 255."""
        ...


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Short SHA-256 of names, dtypes, shapes and values: the same for the same network in any file."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy().tobytes())
    return digest.hexdigest()[:ID_DIGITS]


def as_rows(part: Tensor, count: int, name: str, path: str) -> NDArray[np.float32]:
    """[N,...] -> [N,-1] float32."""
    if part.ndim < 2 or len(part) != count or not part.is_floating_point():
        raise UserError(
            f"{path} returned {name} of shape {tuple(part.shape)} and type {part.dtype} for {count} images; "
            f"they must be floats [{count}, ...]"
        )
    return part.flatten(1).float().cpu().numpy()
