"""Any TorchScript module as an extractor.

Shapes: N images, H and W height and width, D pooled features.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch import Tensor, nn

from cm.errors import UserError
from cm.io import untrusted
from cm.io.atomic import AtomicFile
from cm.io.budget import parse_json
from cm.io.downloads import sha256
from cm.networks.layers import full_float32
from evaluations.features.base import ID_DIGITS, INCEPTION_HEAD, Features, as_rows, hash_weights
from evaluations.features.classifier import Classifier, classifier_of
from evaluations.features.preprocessing import Preprocessing, read_preprocessing
from evaluations.features.torchscript_tensors import check_archive, is_torchscript, read_extra, read_module_tensors
from evaluations.features.trust import read_program

DESCRIPTION_FILE = "extractor.json"                         # inside a TorchScript archive that this toolkit wrote
CLASSIFIER = {"network": "classifier"}                      # in the description of a network that is in this toolkit
OUTPUT_NAMES = ("features", "logits", "spatial")


class TorchScriptExtractor:
    """A TorchScript file: a module called with a uint8 tensor [N,3,H,W] in 0..255.

    It returns features [N,D], or a tuple (features, logits[, spatial]), or a dict with those keys. A module whose
    forward takes `return_features`, as the published Inception-v3 in TorchScript does, is called with it; logits are
    then the features times its `output.weight`.

    With a description next to it (`evaluations.features.preprocessing`), images are resized and normalised first, and
    the module is called with float32 [N,3,S,S], as networks of torchvision's kind are. The description is then part of
    `id`.

    Such a module is a program, and it runs only if the user trusts it. What `scripts/classifier_train.py` wrote does
    not run: its tensors are read into the network of this toolkit.

    :param trusted: the user has named this file as trusted; a file in `trust.list_of_hashes` needs no such word.
    :raises UserError: if the file is missing or is no TorchScript file, the description is wrong, or nobody trusts it.
    """

    def __init__(self, path: str, device: th.device | str = "cpu", trusted: bool = False):
        self.path, self.device = path, device
        self.module, description = open_module(path, device, trusted)
        weights = dict(self.module.state_dict())
        self.preprocessing = read_preprocessing(path)
        network = hash_weights(weights) if weights else sha256(path)[:ID_DIGITS]
        self.id = f"torchscript-{_with_preprocessing(network, self.preprocessing)}"
        # Published FIDs are of uint8 images and Inception's own resize.
        self.is_inception = self.preprocessing is None and any(
            tuple(weight.shape) == INCEPTION_HEAD for weight in weights.values()
        )
        stem = os.path.splitext(os.path.basename(path))[0]
        sidecar_name = None if self.preprocessing is None else self.preprocessing.name
        self.name = sidecar_name or description.get("name") or ("Inception-v3" if self.is_inception else stem)
        self.resize = (
            self.preprocessing.rule if self.preprocessing is not None
            else description.get("resize") or "as the TorchScript module does it"
        )
        self.takes_flag = "return_features" in _arguments_of(self.module)
        self.head = weights.get("output.weight") if self.takes_flag else None

    @staticmethod
    def recognizes(path: str) -> bool:
        """Whether a file is TorchScript."""
        return is_torchscript(path)

    @th.inference_mode()
    def extract(self, images: NDArray[np.uint8]) -> Features:
        """Features of images [N,H,W,3] uint8.

        :raises UserError: if the module cannot take such images, or returns something else than features.
        """
        x = th.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(self.device)       # [N,3,H,W]
        try:
            with full_float32(self.device):
                if self.preprocessing is not None:
                    x = self.preprocessing(x)               # [N,3,S,S] float32
                output = self.module(x, return_features=True) if self.takes_flag else self.module(x)
        except th.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = [line for line in str(error).splitlines() if line.strip()][-1]
            raise UserError(
                f"{self.path} failed on {str(x.dtype).removeprefix('torch.')} images {tuple(x.shape)}, as an extractor "
                f"is called: {cause}{'' if self.preprocessing is not None else _SIDECAR_HINT.format(self.path)}"
            ) from error
        parts = name_outputs(output, self.path)
        if self.head is not None:
            parts["logits"] = parts["features"].float() @ self.head.float().T             # [N,K]
        arrays = {name: as_rows(part, len(x), name, self.path) for name, part in parts.items()}
        return Features(arrays["features"], arrays.get("spatial"), arrays.get("logits"))


def _arguments_of(module: nn.Module) -> list[str]:
    """The names of what a TorchScript module's forward takes; none for a network of this toolkit."""
    forward: Any = module.forward                           # a ScriptMethod, of which the stubs know nothing
    return [argument.name for argument in forward.schema.arguments] if isinstance(module, th.jit.ScriptModule) else []


_SIDECAR_HINT = ". If it takes normalised floats, describe them in {}.json"


def _with_preprocessing(network: str, preprocessing: Preprocessing | None) -> str:
    """The hash of a network and of what is done to images before it."""
    if preprocessing is None:
        return network
    return hashlib.sha256(f"{network} {preprocessing.identity}".encode()).hexdigest()[:ID_DIGITS]


# --- TorchScript files ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_torchscript() -> Iterator[None]:
    """TorchScript is deprecated for new work, but Inception is published in it, and it needs no code of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


def save_torchscript(module: nn.Module, path: str, name: str, resize: str) -> None:
    """Write a module as an extractor file; `name` and `resize` come back when it is loaded."""
    description = {"name": name, "resize": resize, **(CLASSIFIER if isinstance(module, Classifier) else {})}
    with quiet_torchscript(), AtomicFile(path) as file:
        th.jit.save(th.jit.script(module.eval()), file, _extra_files={DESCRIPTION_FILE: json.dumps(description)})


def open_module(path: str, device: th.device | str, trusted: bool) -> tuple[nn.Module, dict[str, str]]:
    """The module in evaluation mode, and its description (empty for files that other programs wrote).

    :raises UserError: if the file is missing or is no TorchScript file, or is a program that nobody trusts.
    """
    if not os.path.isfile(path):
        raise UserError(f"the feature extractor {path} does not exist or is no file")
    if not is_torchscript(path):
        raise not_torchscript(path)
    check_archive(path)
    description = description_in(read_extra(path, DESCRIPTION_FILE), path)
    if description.items() >= CLASSIFIER.items():
        module = classifier_of(read_module_tensors(path), path)
    else:
        module = run_torchscript(path, device, trusted)
    return module.to(device).eval(), description


def run_torchscript(path: str, device: th.device | str, trusted: bool) -> th.jit.ScriptModule:
    """Load a TorchScript module, which runs code of the file. The one place that does.

    :raises UserError: if nobody trusts it, or it is damaged.
    """
    content = read_program(path, trusted)
    try:
        with quiet_torchscript():
            return th.jit.load(path if content is None else io.BytesIO(content), map_location=device)
    except RuntimeError:
        raise not_torchscript(path) from None


def not_torchscript(path: str) -> UserError:
    """The error for a file that this kind of extractor cannot be read from."""
    return UserError(
        f"{path} is not a TorchScript file (a checkpoint or state dict is not one either): give a file made by "
        "torch.jit.save, such as inception-2015-12-05.pt or what scripts/classifier_train.py writes"
    )


def description_in(text: bytes | str, path: str) -> dict[str, str]:
    """Name and resize, as far as they are said."""
    try:
        description = parse_json(text or "{}")
    except ValueError as error:
        raise UserError(f"{path}: its {DESCRIPTION_FILE} is not JSON: {error}") from None
    if not isinstance(description, dict) or not all(isinstance(value, str) for value in description.values()):
        raise UserError(f"{path}: its {DESCRIPTION_FILE} must hold names and texts: {untrusted.shown(description)}")
    return description


# --- what a module returns -----------------------------------------------------------------------------------------


def name_outputs(output: Any, path: str) -> dict[str, Tensor]:
    """A tensor, tuple or dict of tensors by name."""
    if isinstance(output, Tensor):
        output = (output,)
    if isinstance(output, tuple) and len(output) <= len(OUTPUT_NAMES):
        output = dict(zip(OUTPUT_NAMES, output))
    if not isinstance(output, dict) or "features" not in output or not set(output) <= set(OUTPUT_NAMES):
        got = f"a dict of {', '.join(map(str, output))}" if isinstance(output, dict) else f"a {type(output).__name__}"
        raise UserError(
            f"{path} returned {got}; an extractor returns features [N,D], a tuple (features, logits, spatial) or a "
            "dict with those keys; only the features are required"
        )
    return dict(output)
