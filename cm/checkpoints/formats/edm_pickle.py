"""The pickles of NVlabs/edm, read as data: nothing that they contain is ever run.

Such a pickle is a program. Its networks are "persistent": they carry the source code of their classes, which the
usual reader executes. This one knows a short list of names; it keeps the contents of objects in records, ignores the
source, and refuses a file that asks for anything else. The records then give the weights and the options of the
network.
"""

from __future__ import annotations

import inspect
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch as th
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from cm.errors import UserError
from cm.networks.edm import SONG, DhariwalUNet, SongUNet
from cm.registry import lookup

PERSISTENT_VERSION = 6


class Record:
    """An object of a class that is not here: its contents, and the class's name where the pickle tells it."""

    class_name = ""
    state: Mapping[str, Any] = {}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.state = state


def persistent_record(meta: Mapping[str, Any]) -> Record:
    """What `_reconstruct_persistent_obj` is called with, as a record; `module_src`, the source code, is left alone."""
    if meta["type"] != "class" or meta["version"] != PERSISTENT_VERSION:
        raise pickle.UnpicklingError(f"a persistent {meta['type']} of version {meta['version']}, not a class "
                                     f"of version {PERSISTENT_VERSION}")
    record = Record()
    record.class_name, record.state = str(meta["class_name"]), dict(meta["state"] or {})
    return record


def tensor_of_parameter(data: Tensor, requires_grad: bool, hooks: Any) -> Tensor:
    return data


def storage_from_bytes(content: bytes) -> Any:
    """The numbers behind tensors; torch's own reader would unpickle these bytes without limits."""
    return th.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class NumberType:
    """numpy.dtype of a plain number, such as f8."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        if name not in ("b1", "i4", "i8", "f4", "f8"):
            raise pickle.UnpicklingError(f"a numpy number of type {name!r}")
        self.name, self.byte_order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"a numpy number of byte order {state[1]!r}")
        self.byte_order = state[1]


def number(kind: NumberType, content: bytes) -> float | int | bool:
    return np.frombuffer(content, kind.byte_order + kind.name)[0].item()


class Call:
    """A function that a pickle may call and cannot change: pickles can set attributes of whatever they are given."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it tries to change {self.function.__name__}")


# All that a pickle may ask for, and what it gets.
ALLOWED = {
    "torch_utils.persistence._reconstruct_persistent_obj": Call(persistent_record),
    "torch.nn.modules.container.ModuleDict": Record,
    "torch.nn.modules.container.ModuleList": Record,
    "torch.nn.modules.container.Sequential": Record,
    "collections.OrderedDict": OrderedDict,
    "dnnlib.util.EasyDict": dict,
    "torch._utils._rebuild_tensor_v2": Call(_rebuild_tensor_v2),
    "torch._utils._rebuild_parameter": Call(tensor_of_parameter),
    "torch.storage._load_from_bytes": Call(storage_from_bytes),
    "numpy.core.multiarray.scalar": Call(number),
    "numpy._core.multiarray.scalar": Call(number),
    "numpy.dtype": NumberType,
}


class Reader(pickle.Unpickler):
    """Rebuilds records and tensors.

    :raises pickle.UnpicklingError: for a name that is not in ALLOWED, before anything is done with it.
    """

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {full}, which no EDM network needs")
        return ALLOWED[full]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside of the file")


@dataclass(frozen=True)
class EDMNet:
    """A network of a pickle."""

    flags: dict[str, Any]                       # as in the configuration of a checkpoint
    weights: dict[str, Tensor]                  # as in the state dict of the network that the flags describe


def read(file: IO[bytes], source: str) -> EDMNet:
    """The averaged network of an EDM pickle.

    :raises UserError: if it is none, is damaged, asks for something that is not on the list, or holds a network that
        this toolkit does not have.
    """
    try:
        content = Reader(file).load()
        net = content.get("ema") if isinstance(content, Mapping) else None
        if not isinstance(net, Record) or not isinstance(part(net, "_modules", "model"), Record):
            names = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise UserError(f"{source} holds no EDM network: it has no 'ema' with a 'model', only {names or 'nothing'}")
        return convert(net, source)
    except UserError:
        raise
    except Exception as error:                              # a damaged or hostile file can lead to any
        reason = str(error).strip().split("\n")[0] or "it is damaged"
        raise UserError(f"{source} is not read as an EDM pickle: {reason} ({type(error).__name__}). Nothing in it was "
                        "run") from None


def part(record: Record, kind: str, name: str) -> Any:
    """A parameter, buffer or module of a record; None if it has no such."""
    return record.state.get(kind, {}).get(name)


def tensors_of(record: Record, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a module and all within it."""
    found = {}
    for kind in ("_parameters", "_buffers"):
        values = record.state.get(kind, {}).items()
        found |= {prefix + name: value.detach() for name, value in values if isinstance(value, Tensor)}
    for name, module in record.state.get("_modules", {}).items():
        if isinstance(module, Record):
            found |= tensors_of(module, f"{prefix}{name}.")
    return found


# --- what a network is called here -----------------------------------------------------------------------------------


class Law(NamedTuple):
    """A preconditioning here, and the constants that its formulas have."""

    precond: str
    constants: dict[str, float]


PRECOND_CLASSES = {
    "EDMPrecond": Law("edm", {"sigma_data": 0.5}),
    "VPPrecond": Law("vp", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "VEPrecond": Law("ve", {"sigma_min": 0.02, "sigma_max": 100}),
    "iDDPMPrecond": Law("iddpm", {"C_1": 0.001, "C_2": 0.008, "M": 1000}),
}
NETWORK_CLASSES = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
NOT_FOR_SAMPLING = ("dropout", "label_dropout")                     # arguments that change no image
# Arguments with one legal value each, where a network has them.
FIXED = {"channel_mult_emb": 4, "in_channels": 3, "decoder_type": "standard"}


def convert(net: Record, source: str) -> EDMNet:
    """A record of one of EDM's preconditionings around one of its networks, in the words of this toolkit.

    :raises UserError: for another class, or a constant or argument that this toolkit does not have.
    """
    law = lookup(PRECOND_CLASSES, net.class_name, f"preconditioning in {source}")
    for name, value in law.constants.items():
        demand(net.state.get(name, value) == value, source, name, net.state.get(name), value)
    model = part(net, "_modules", "model")
    arguments = arguments_of(model, source)
    for name, value in FIXED.items():
        demand(arguments.get(name, value) == value, source, name, arguments.get(name), value)
    weights = tensors_of(model)
    if law.precond == "iddpm":                                      # it predicts a variance too, which no sampler uses
        weights |= {name: value[:3].clone() for name, value in weights.items() if name.startswith("out_conv.")}
    label_dim = arguments["label_dim"]
    return EDMNet(
        {
            "arch": arch_of(model.class_name, arguments, source),
            "image_size": arguments["img_resolution"],
            "num_channels": arguments["model_channels"],
            "num_res_blocks": arguments["num_blocks"],
            "channel_mult": ",".join(f"{mult:g}" for mult in arguments["channel_mult"]),
            "attention_resolutions": ",".join(map(str, arguments["attn_resolutions"])),
            "class_cond": label_dim > 0,
            "num_classes": label_dim,
            "augment_dim": arguments["augment_dim"],
            "num_head_channels": -1,
            "learn_sigma": False,
            "precond": law.precond,
            "training_mode": "edm",
        },
        weights,
    )


def arguments_of(model: Record, source: str) -> dict[str, Any]:
    """What the network was made with; EDM's defaults are those of the classes here."""
    kind = lookup(NETWORK_CLASSES, model.class_name, f"network in {source}")
    known = inspect.signature(kind).parameters
    defaults = {name: parameter.default for name, parameter in known.items()}
    given = dict(zip(known, model.state.get("_init_args") or ())) | dict(model.state.get("_init_kwargs") or {})
    strange = [name for name in given if name not in (*known, *NOT_FOR_SAMPLING, *FIXED)]
    missing = [name for name, value in (defaults | given).items() if value is inspect.Parameter.empty]
    if strange or missing:
        raise UserError(f"{source} holds a {model.class_name} of another kind than EDM's: "
                        f"unknown arguments {strange}, missing {missing}")
    return defaults | given


def arch_of(class_name: str, arguments: Mapping[str, Any], source: str) -> str:
    if class_name == "DhariwalUNet":
        return "adm"
    own = {name: arguments[name] for name in next(iter(SONG.values()))}
    own["resample_filter"] = tuple(own["resample_filter"])
    for arch, options in SONG.items():
        if own == options:
            return arch
    raise UserError(f"{source} holds a SongUNet that is neither DDPM++ nor NCSN++: {own}")


def demand(holds: bool, source: str, name: str, value: Any, legal: Any) -> None:
    if not holds:
        raise UserError(f"{source} was made with {name}={value!r}; this toolkit knows {legal!r} alone")
