"""Networks that turn images into features; `EXTRACTORS` lists the kinds, `load_extractor` opens one."""

from __future__ import annotations

import os
from typing import Any

import torch as th

from cm.errors import UserError
from cm.registry import Table, lookup
from evaluations.defaults import EXTRACTOR_CHOICES, EXTRACTOR_VARIABLE
from evaluations.features.base import Extractor, Features
from evaluations.features.inception import InceptionExtractor
from evaluations.features.inception_files import FILES, find_weights
from evaluations.features.tf_graph import FrozenGraphExtractor
from evaluations.features.torchscript import TorchScriptExtractor, save_torchscript

__all__ = [
    "EXTRACTORS", "Extractor", "Features", "InceptionExtractor", "TorchScriptExtractor", "load_extractor",
    "save_torchscript",
]

EXTRACTORS: Table[Any] = Table("kind of extractor", {
    "tf": FrozenGraphExtractor, "torch": InceptionExtractor, "torchscript": TorchScriptExtractor,
})
"""Kinds of extractors; a path without a kind is opened by the first kind that `recognizes` it."""


def load_extractor(
    spec: str | None = None, device: th.device | str = "cpu", default: str = "torch", *, trusted: bool = False
) -> Extractor:
    """Load the extractor that `spec` names. All ranks must call it together.

    :param spec: PATH, KIND:PATH, or only KIND for the published weights of Inception-v3, which are downloaded to the
        cache of torch.hub if necessary. None or empty: $CM_INCEPTION, or else `default`.
    :param device: where to compute.
    :param default: a kind in `evaluations.features.inception_files.FILES`.
    :param trusted: whether to run a file that is a program (see `evaluations.features.trust`).
    :raises UserError: if the file is missing or of another kind, the weights cannot be downloaded, or the file is a
        program that is not trusted.
    """
    spec = spec or os.environ.get(EXTRACTOR_VARIABLE) or default
    if os.path.isfile(spec):
        kind, path = kind_of(spec), spec
    elif ":" in spec:
        kind, _, path = spec.partition(":")
    elif spec in FILES:
        kind, path = spec, find_weights(spec)
    else:
        raise UserError(f"the feature extractor {spec} does not exist or is no file; give {EXTRACTOR_CHOICES}; kinds: "
                        f"{', '.join(EXTRACTORS)}")
    opened = lookup(EXTRACTORS, kind, "kind of extractor")
    return opened(path, device, trusted) if opened is TorchScriptExtractor else opened(path, device)


def kind_of(path: str) -> str:
    """The kind of an existing file, from its content."""
    return next(kind for kind, extractor in EXTRACTORS.items() if extractor.recognizes(path))
