"""The pickles of NVlabs/edm, read as data: nothing that they contain is ever run.

Such a pickle is a program. Its networks are "persistent": they contain the source code of their classes, which the
usual reader executes. This reader has a short list of allowed names; it keeps the contents of objects in records,
ignores the source, and refuses a file that uses any other. The records then give the weights and the options
of the network.
"""

from __future__ import annotations

import dataclasses
import io
import mmap
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch as th
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from cm.distributed.collectives import read_everywhere
from cm.errors import UserError
from cm.io.pickles import Call, Record
from cm.networks.edm import SONG, DhariwalConfig, SongConfig
from cm.registry import lookup

PERSISTENT_VERSION = 6


def _persistent_record(meta: Mapping[str, Any]) -> Record:
    """What `_reconstruct_persistent_obj` is called with, as a record; `module_src`, the source code, is ignored."""
    if meta["type"] != "class" or meta["version"] != PERSISTENT_VERSION:
        raise pickle.UnpicklingError(f"a persistent {meta['type']} of version {meta['version']}, not a class "
                                     f"of version {PERSISTENT_VERSION}")
    record = Record()
    record.class_name, record.state = str(meta["class_name"]), dict(meta["state"] or {})
    return record


def _tensor_of_parameter(data: Tensor, requires_grad: bool, hooks: Any) -> Tensor:
    """What `torch._utils._rebuild_parameter` is called with, as a plain tensor."""
    return data


def _storage_from_bytes(content: bytes) -> Any:
    """The storage of tensors; torch's own function would unpickle these bytes without limits."""
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


def _number(kind: NumberType, content: bytes) -> float | int | bool:
    """A numpy scalar as a Python number."""
    return np.frombuffer(content, kind.byte_order + kind.name)[0].item()


# Every name that a pickle may use, and what stands for it here.
ALLOWED = {
    "torch_utils.persistence._reconstruct_persistent_obj": Call(_persistent_record),
    "torch.nn.modules.container.ModuleDict": Record,
    "torch.nn.modules.container.ModuleList": Record,
    "torch.nn.modules.container.Sequential": Record,
    "collections.OrderedDict": OrderedDict,
    "dnnlib.util.EasyDict": dict,
    "torch._utils._rebuild_tensor_v2": Call(_rebuild_tensor_v2),
    "torch._utils._rebuild_parameter": Call(_tensor_of_parameter),
    "torch.storage._load_from_bytes": Call(_storage_from_bytes),
    "numpy.core.multiarray.scalar": Call(_number),
    "numpy._core.multiarray.scalar": Call(_number),
    "numpy.dtype": NumberType,
}


class Reader(pickle.Unpickler):
    """Rebuilds records and tensors.

    :raises pickle.UnpicklingError: for a name that is not in ALLOWED, before anything is done with it.
    """

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name of the pickle."""
        full = f"{module}.{name}"
        if full not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {full}, which no EDM network needs")
        return ALLOWED[full]

    def persistent_load(self, pid: Any) -> Any:
        """Refuse data outside of the file."""
        raise pickle.UnpicklingError("it refers to data outside of the file")


@dataclass(frozen=True)
class EDMNet:
    """A network of a pickle."""

    flags: dict[str, Any]                       # as in the configuration of a checkpoint
    weights: dict[str, Tensor]                  # as in the state dict of the network that the flags describe


def read(file: IO[bytes] | mmap.mmap, source: str) -> EDMNet:
    """The averaged network of an EDM pickle.

    :raises UserError: if it is none, is damaged, uses a name that is not in ALLOWED, or holds a network that this
        toolkit does not have.
    """
    try:
        content = Reader(file).load()
        net = content.get("ema") if isinstance(content, Mapping) else None
        if not isinstance(net, Record) or not isinstance(_part(net, "_modules", "model"), Record):
            names = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise UserError(f"{source} holds no EDM network: it has no 'ema' with a 'model', only {names or 'nothing'}")
        return _convert(net, source)
    except UserError:
        raise
    except Exception as error:                              # a damaged or hostile file can lead to any
        reason = str(error).strip().split("\n")[0] or "it is damaged"
        raise UserError(f"{source} is not read as an EDM pickle: {reason} ({type(error).__name__}). Nothing in it was "
                        "run") from None


def read_path(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The flags and weights of a file, on every rank; see `read`."""
    net = read(read_everywhere(path), path)
    return net.flags, net.weights


def _part(record: Record, kind: str, name: str) -> Any:
    """A parameter, buffer or module of a record; None if it has none of that name."""
    return record.state.get(kind, {}).get(name)


def _tensors_of(record: Record, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a module and all within it."""
    found = {}
    for kind in ("_parameters", "_buffers"):
        values = record.state.get(kind, {}).items()
        found |= {prefix + name: value.detach() for name, value in values if isinstance(value, Tensor)}
    for name, module in record.state.get("_modules", {}).items():
        if isinstance(module, Record):
            found |= _tensors_of(module, f"{prefix}{name}.")
    return found


# --- the names of this toolkit --------------------------------------------------------------------------------------


class Preconditioning(NamedTuple):
    """A preconditioning of this toolkit, and the constants in its formulas."""

    name: str
    constants: dict[str, float]


PRECOND_CLASSES = {
    "EDMPrecond": Preconditioning("edm", {"sigma_data": 0.5}),
    "VPPrecond": Preconditioning("vp", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "VEPrecond": Preconditioning("ve", {"sigma_min": 0.02, "sigma_max": 100}),
    "iDDPMPrecond": Preconditioning("iddpm", {"C_1": 0.001, "C_2": 0.008, "M": 1000}),
}
NETWORK_CONFIGS = {"SongUNet": SongConfig, "DhariwalUNet": DhariwalConfig}
NOT_FOR_SAMPLING = ("dropout", "label_dropout")                     # arguments that change no image
# Arguments with one legal value each, where a network has them.
FIXED = {"channel_mult_emb": 4, "decoder_type": "standard"}


def _convert(net: Record, source: str) -> EDMNet:
    """A record of one of EDM's preconditionings around one of its networks, as flags and weights of this toolkit.

    :raises UserError: for another class, or a constant or argument that this toolkit does not have.
    """
    precond = lookup(PRECOND_CLASSES, net.class_name, f"preconditioning in {source}")
    for name, value in precond.constants.items():
        _demand(net.state.get(name, value) == value, source, name, net.state.get(name), value)
    model = _part(net, "_modules", "model")
    arguments = _arguments_of(model, source)
    for name, value in FIXED.items():
        _demand(arguments.get(name, value) == value, source, name, arguments.get(name), value)
    weights = _tensors_of(model)
    if precond.name == "iddpm":                                     # it also predicts a variance, which no sampler uses
        kept = arguments["in_channels"]
        weights |= {name: value[:kept].clone() for name, value in weights.items() if name.startswith("out_conv.")}
    label_dim = arguments["label_dim"]
    return EDMNet(
        {
            "arch": _arch_of(model.class_name, arguments, source),
            "image_size": arguments["img_resolution"],
            "channels": arguments["in_channels"],
            "num_channels": arguments["model_channels"],
            "num_res_blocks": arguments["num_blocks"],
            "channel_mult": ",".join(f"{mult:g}" for mult in arguments["channel_mult"]),
            "attention_resolutions": ",".join(map(str, arguments["attn_resolutions"])),
            "class_cond": label_dim > 0,
            "num_classes": label_dim,
            "null_class": label_dim > 0 and bool(arguments.get("label_dropout", 0)),
            "augment_dim": arguments["augment_dim"],
            "num_head_channels": -1,
            "learn_sigma": False,
            "precond": precond.name,
            "training_mode": "edm",
        },
        weights,
    )


def _arguments_of(model: Record, source: str) -> dict[str, Any]:
    """What the network was made with; EDM's defaults are those of the configurations here."""
    known = dataclasses.fields(lookup(NETWORK_CONFIGS, model.class_name, f"network in {source}"))
    defaults = {field.name: field.default for field in known}
    in_order = [field.name for field in known if not field.kw_only]
    positional = tuple(model.state.get("_init_args") or ())
    given = dict(zip(in_order, positional)) | dict(model.state.get("_init_kwargs") or {})
    strange = [name for name in given if name not in (*defaults, *NOT_FOR_SAMPLING, *FIXED)]
    strange += [f"number {number}" for number in range(len(in_order), len(positional))]
    missing = [name for name, value in (defaults | given).items() if value is dataclasses.MISSING]
    if strange or missing:
        raise UserError(f"{source} holds a {model.class_name} of another kind than EDM's: "
                        f"unknown arguments {strange}, missing {missing}")
    return defaults | given


def _arch_of(class_name: str, arguments: Mapping[str, Any], source: str) -> str:
    """The --arch of a network.

    :raises UserError: if there is none.
    """
    if class_name == "DhariwalUNet":
        return "adm"
    own = {name: arguments[name] for name in next(iter(SONG.values()))}
    own["resample_filter"] = tuple(own["resample_filter"])
    for arch, options in SONG.items():
        if own == options:
            return arch
    raise UserError(f"{source} holds a SongUNet that is neither DDPM++ nor NCSN++: {own}")


def _demand(holds: bool, source: str, name: str, value: Any, legal: Any) -> None:
    """:raises UserError: unless a value is the legal one."""
    if not holds:
        raise UserError(f"{source} was made with {name}={value!r}; this toolkit knows {legal!r} alone")
