"""Networks that turn images into features, behind one call; `EXTRACTORS` lists the kinds of file they come in.

Shapes: N images, H and W height and width, D pooled features, S spatial features (flattened), K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch import Tensor, nn

from cm.registry import UserError, lookup

ENVIRONMENT_VARIABLE = "CM_INCEPTION"
DESCRIPTION_FILE = "extractor.json"                         # inside a TorchScript archive that this toolkit wrote
INCEPTION_HEAD = (1008, 2048)                               # the classes and features of Inception-v3 of 2015-12-05
OUTPUT_NAMES = ("features", "logits", "spatial")


class Features(NamedTuple):
    pool: NDArray[np.float32]                               # [N,D]
    spatial: NDArray[np.float32] | None                     # [N,S]
    logits: NDArray[np.float32] | None                      # [N,K]; Inception's without the last layer's bias


class Extractor(Protocol):
    id: str                                                 # kind and hash of the weights; stored beside statistics
    name: str                                               # for people
    resize: str                                             # what happens to the images first
    is_inception: bool                                      # whether published FIDs are in these features

    def extract(self, images: NDArray[np.uint8]) -> Features:
        """Features of images [N,H,W,3], values 0 to 255."""


class TorchScriptExtractor:
    """A TorchScript file: a module called with a uint8 tensor [N,3,H,W] in 0..255.

    It returns features [N,D], or a tuple (features, logits[, spatial]), or a dict with those keys. A module whose
    forward takes `return_features`, as the published Inception-v3 in TorchScript does, is called with it; logits are
    then the features times its `output.weight`.

    :raises UserError: if the file is missing or is no TorchScript file.
    """

    def __init__(self, path: str, device: th.device | str = "cpu"):
        self.path, self.device = path, device
        self.module, description = load_torchscript(path, device)
        weights = dict(self.module.state_dict())
        self.id = f"torchscript-{hash_weights(weights) if weights else hash_file(path)}"
        self.is_inception = any(tuple(weight.shape) == INCEPTION_HEAD for weight in weights.values())
        stem = os.path.splitext(os.path.basename(path))[0]
        self.name = description.get("name") or ("Inception-v3" if self.is_inception else stem)
        self.resize = description.get("resize") or "as the TorchScript module does it"
        self.takes_flag = "return_features" in (arg.name for arg in self.module.forward.schema.arguments)
        self.head = weights.get("output.weight") if self.takes_flag else None

    @th.inference_mode()
    def extract(self, images: NDArray[np.uint8]) -> Features:
        """Features of images [N,H,W,3] uint8.

        :raises UserError: if the module cannot take such images, or returns something else than features.
        """
        x = th.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(self.device)       # [N,3,H,W]
        try:
            output = self.module(x, return_features=True) if self.takes_flag else self.module(x)
        except th.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = [line for line in str(error).splitlines() if line.strip()][-1]
            raise UserError(
                f"{self.path} failed on uint8 images {tuple(x.shape)}, as an extractor is called: {cause}"
            ) from error
        parts = name_outputs(output, self.path)
        if self.head is not None:
            parts["logits"] = parts["features"].float() @ self.head.float().T             # [N,K]
        arrays = {name: as_rows(part, len(x), name, self.path) for name, part in parts.items()}
        return Features(arrays["features"], arrays.get("spatial"), arrays.get("logits"))


EXTRACTORS = {"torchscript": TorchScriptExtractor}


def load_extractor(spec: str | None = None, device: th.device | str = "cpu") -> Extractor:
    """The extractor that `spec` names: PATH, or KIND:PATH with a kind of `EXTRACTORS`; by default $CM_INCEPTION.

    :raises UserError: if nothing is given, or the file is missing or of another kind.
    """
    spec = spec or os.environ.get(ENVIRONMENT_VARIABLE)
    if not spec:
        raise UserError(
            "these metrics need a feature extractor, and none is given: pass --inception PATH (or set "
            f"{ENVIRONMENT_VARIABLE}=PATH) with a TorchScript file, such as inception-2015-12-05.pt or what "
            "scripts/classifier_train.py writes"
        )
    kind, colon, path = spec.partition(":")
    if not colon or os.path.exists(spec):
        kind, path = "torchscript", spec
    return lookup(EXTRACTORS, kind, "kind of extractor")(path, device)


# --- TorchScript files ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_torchscript() -> Iterator[None]:
    """TorchScript is deprecated for new work, but Inception is published in it, and it needs no code of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


def save_torchscript(module: nn.Module, path: str, name: str, resize: str) -> None:
    """Write a module as an extractor file; `name` and `resize` come back when it is loaded."""
    partial = f"{path}.partial"
    with quiet_torchscript():
        scripted = th.jit.script(module.eval())
        th.jit.save(scripted, partial, _extra_files={DESCRIPTION_FILE: json.dumps({"name": name, "resize": resize})})
    os.replace(partial, path)


def load_torchscript(path: str, device: th.device | str) -> tuple[th.jit.ScriptModule, dict[str, str]]:
    """The module in evaluation mode, and its description (empty for files that other programs wrote)."""
    if not os.path.isfile(path):
        raise UserError(f"the feature extractor {path} does not exist or is no file")
    extra = {DESCRIPTION_FILE: ""}
    try:
        with quiet_torchscript():
            module = th.jit.load(path, map_location=device, _extra_files=extra)
    except RuntimeError:
        raise UserError(
            f"{path} is not a TorchScript file (a checkpoint or state dict is not one either): give a file made by "
            "torch.jit.save, such as inception-2015-12-05.pt or what scripts/classifier_train.py writes"
        ) from None
    return module.eval(), json.loads(extra[DESCRIPTION_FILE] or "{}")


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Short SHA-256 of names, types, shapes and values: the same network has it in whatever file it is."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy())
    return digest.hexdigest()[:12]


def hash_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:12]


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


def as_rows(part: Tensor, count: int, name: str, path: str) -> NDArray[np.float32]:
    """[N,...] -> [N,-1] float32."""
    if part.ndim < 2 or len(part) != count or not part.is_floating_point():
        raise UserError(
            f"{path} returned {name} of shape {tuple(part.shape)} and type {part.dtype} for {count} images; "
            f"they must be floats [{count}, ...]"
        )
    return part.flatten(1).float().cpu().numpy()
