"""The pickles of NVlabs/edm and NVlabs/edm2, read as data: nothing that they contain is ever run.

Such a pickle is a program. Its networks are "persistent": they contain the source code of their classes, which the
usual reader executes. This reader has a short list of allowed names; it keeps the contents of objects in records,
ignores the source, and refuses a file that uses any other. The records then give the weights and the options
of the network.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, cast

import numpy as np
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from cm.checkpoints.formats.pickled_numbers import Array, NumberType, array, number
from cm.data.latents import FINAL_STD, RECORD, LatentRecord
from cm.distributed.collectives import read_everywhere
from cm.errors import UserError
from cm.io import pickle_scan, torch_files
from cm.io.budget import WEIGHTS, Budget, Meter
from cm.io.pickles import Call, Record
from cm.networks.edm import SONG, DhariwalConfig, EDMConfig, SongConfig
from cm.registry import lookup

PERSISTENT_VERSION = 6
MODULES = Budget(0, 50_000, 20)                                     # a node is a module; EDM's largest has 800


def _persistent_record(meta: Mapping[str, Any]) -> Record:
    """What `_reconstruct_persistent_obj` is called with, as a record; `module_src`, the source code, is ignored."""
    if meta["type"] != "class" or meta["version"] != PERSISTENT_VERSION:
        raise pickle.UnpicklingError(f"a persistent {meta['type']} of version {meta['version']}, not a class "
                                     f"of version {PERSISTENT_VERSION}")
    record = Record()
    record.class_name, record.state = str(meta["class_name"]), dict(meta["state"] or {})
    return record


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """What `torch._utils._rebuild_tensor_v2` is called with; torch would enlarge a storage that is too short."""
    if math.prod(size) and min((offset, *size, *stride)) >= 0:
        last = offset + sum((length - 1) * step for length, step in zip(size, stride))
        held = storage._untyped_storage.nbytes() // storage._element_size()
        if last >= held:
            raise pickle.UnpicklingError(f"a tensor of {last + 1:,} numbers in a storage of {held:,}")
    return _rebuild_tensor_v2(storage, offset, size, stride, *rest)


def _tensor_of_parameter(data: Tensor, requires_grad: bool, hooks: Any) -> Tensor:
    """What `torch._utils._rebuild_parameter` is called with, as a plain tensor."""
    return data


def _storage_from_bytes(content: bytes) -> Any:
    """The storage of tensors; torch's own function would unpickle these bytes without limits."""
    return torch_files.load(io.BytesIO(content), len(content))


# Every name that a pickle may use, and what stands for it here.
ALLOWED = {
    "torch_utils.persistence._reconstruct_persistent_obj": Call(_persistent_record),
    "torch.nn.modules.container.ModuleDict": Record,
    "torch.nn.modules.container.ModuleList": Record,
    "torch.nn.modules.container.Sequential": Record,
    "collections.OrderedDict": OrderedDict,
    "dnnlib.util.EasyDict": dict,
    "torch._utils._rebuild_tensor_v2": Call(_tensor),
    "torch._utils._rebuild_parameter": Call(_tensor_of_parameter),
    "torch.storage._load_from_bytes": Call(_storage_from_bytes),
    "numpy.core.multiarray.scalar": Call(number),
    "numpy._core.multiarray.scalar": Call(number),
    "numpy.core.multiarray._reconstruct": Call(array),
    "numpy._core.multiarray._reconstruct": Call(array),
    "numpy.ndarray": Array,
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
        pickle_scan.scan(cast(IO[bytes], file), WEIGHTS)
        file.seek(0)
        content = Reader(cast(IO[bytes], file)).load()
        net = content.get("ema") if isinstance(content, Mapping) else None
        if not isinstance(net, Record) or _network_in(net) is None:
            names = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise UserError(f"{source} contains no EDM network: it has no 'ema' with a 'model', only "
                            f"{names or 'nothing'}")
        converted = _convert(net, source)
        converted.flags.update(_latents_of(content.get("encoder"), converted.flags["channels"]))
        torch_files.check_extent(converted.weights, file.seek(0, io.SEEK_END) or file.tell())
        return converted
    except UserError:
        raise
    except Exception as error:                              # a damaged or hostile file can lead to any
        reason = str(error).strip().split("\n")[0] or "it is damaged"
        raise UserError(f"{source} cannot be read as an EDM pickle: {reason} ({type(error).__name__}). Nothing in it "
                        "was run") from None


def read_path(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The flags and weights of a file, on every rank; see `read`."""
    net = read(read_everywhere(path), path)
    return net.flags, net.weights


def _part(record: Record, kind: str, name: str) -> Any:
    """A parameter, buffer or module of a record; None if it has none of that name."""
    return record.state.get(kind, {}).get(name)


def _network_in(net: Record) -> Record | None:
    """The network within a preconditioning: `model` in EDM's, `unet` in EDM2's."""
    found = _part(net, "_modules", "unet" if net.class_name == EDM2_PRECOND else "model")
    return found if isinstance(found, Record) else None


def _tensors_of(record: Record) -> dict[str, Tensor]:
    """The state dict of a module and all within it.

    :raises ValueError: for more modules than any network has, as where they contain one another.
    """
    found, meter, waiting = {}, Meter(MODULES), [("", record, 1)]
    while waiting:
        prefix, module, depth = waiting.pop()
        meter.spend()
        meter.descend(depth)
        for kind in ("_parameters", "_buffers"):
            values = module.state.get(kind, {}).items()
            found |= {prefix + name: value.detach() for name, value in values if isinstance(value, Tensor)}
        inner = module.state.get("_modules", {}).items()
        waiting += [(f"{prefix}{name}.", each, depth + 1) for name, each in inner if isinstance(each, Record)]
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
EDM2_PRECOND, EDM2_ENCODER = "Precond", "StabilityVAEEncoder"
NOT_FOR_SAMPLING = ("dropout", "label_dropout")                     # arguments that change no image
REQUIRED = dataclasses.MISSING                                      # the default of an argument that has none


class Signature(NamedTuple):
    """A network's arguments: those with a place, all with their defaults, and those with one legal value."""

    in_order: tuple[str, ...]
    defaults: dict[str, Any]
    fixed: dict[str, Any]

    @classmethod
    def of(cls, config: type[EDMConfig], fixed: dict[str, Any]) -> Signature:
        """Of one of EDM's networks, whose configuration here has its names and defaults."""
        fields = dataclasses.fields(config)
        in_order = tuple(field.name for field in fields if not field.kw_only)
        return cls(in_order, {field.name: field.default for field in fields}, fixed)


EDM_FIXED = {"channel_mult_emb": 4, "decoder_type": "standard"}
EDM2_IN_ORDER = {
    "img_resolution": REQUIRED, "img_channels": REQUIRED, "label_dim": REQUIRED, "model_channels": 192,
    "channel_mult": (1, 2, 3, 4), "channel_mult_noise": None, "channel_mult_emb": None, "num_blocks": 3,
    "attn_resolutions": (16, 8), "label_balance": 0.5, "concat_balance": 0.5,
}
EDM2_FIXED = {
    "channel_mult_noise": None, "channel_mult_emb": None, "label_balance": 0.5, "concat_balance": 0.5,
    "resample_filter": [1, 1], "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256,
}
SIGNATURES = {
    "SongUNet": Signature.of(SongConfig, EDM_FIXED),
    "DhariwalUNet": Signature.of(DhariwalConfig, EDM_FIXED),
    "UNet": Signature(tuple(EDM2_IN_ORDER), EDM2_IN_ORDER | {"channels_per_head": 64}, EDM2_FIXED),
}


def _convert(net: Record, source: str) -> EDMNet:
    """A record of a preconditioning around one of the networks of EDM or EDM2, as flags and weights of this toolkit.

    :raises UserError: for another class, or a constant or argument that this toolkit does not have.
    """
    model = _network_in(net)
    assert model is not None
    if net.class_name == EDM2_PRECOND:
        return _convert_edm2(net, model, source)
    precond = lookup(PRECOND_CLASSES, net.class_name, f"preconditioning in {source}")
    _demand_constants(net, precond.constants, source)
    arguments = _arguments_of(model, source)
    weights = _tensors_of(model)
    if precond.name == "iddpm":                                     # it also predicts a variance, which no sampler uses
        kept = arguments["in_channels"]
        weights |= {name: value[:kept].clone() for name, value in weights.items() if name.startswith("out_conv.")}
    flags = {
        "arch": _arch_of(model.class_name, arguments, source),
        "channels": arguments["in_channels"],
        "null_class": arguments["label_dim"] > 0 and bool(arguments.get("label_dropout", 0)),
        "augment_dim": arguments["augment_dim"],
        "num_head_channels": -1,
        "precond": precond.name,
    }
    return EDMNet(_common_flags(arguments) | flags, weights)


def _convert_edm2(net: Record, model: Record, source: str) -> EDMNet:
    """The same for EDM2, whose files hold float16 numbers."""
    _demand_constants(net, {"sigma_data": 0.5}, source)
    arguments = _arguments_of(model, source)
    flags = {
        "arch": "edm2",
        "channels": arguments["img_channels"],
        "null_class": False,
        "augment_dim": 0,
        "num_head_channels": arguments["channels_per_head"],
        "precond": "edm",
    }
    weights = {name: value.float() for name, value in _tensors_of(net).items()}
    return EDMNet(_common_flags(arguments) | flags, weights)


def _latents_of(encoder: Any, channels: int) -> dict[str, str]:
    """How the latents of an EDM2 network are scaled, as the encoder beside it says; nothing for any other encoder.

    It computes x = scale z + bias.
    """
    if not isinstance(encoder, Record) or encoder.class_name != EDM2_ENCODER:
        return {}
    arrays = [encoder.state.get(name) for name in ("scale", "bias")]
    scale, bias = (each.numbers() if isinstance(each, Array) else np.zeros(0) for each in arrays)
    if not len(scale) == len(bias) == channels or not np.isfinite([scale, bias]).all() or scale.min() <= 0:
        return {}
    mean, std = (tuple(float(f"{each:.6g}") for each in values) for values in (-bias / scale, FINAL_STD / scale))
    name = encoder.state.get("vae_name")
    vae = name if isinstance(name, str) else ""
    return {RECORD: LatentRecord(mean=mean, std=std, vae=vae).text()}


def _common_flags(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What EDM and EDM2 call by the same names."""
    label_dim = arguments["label_dim"]
    return {
        "image_size": arguments["img_resolution"],
        "num_channels": arguments["model_channels"],
        "num_res_blocks": arguments["num_blocks"],
        "channel_mult": ",".join(f"{mult:g}" for mult in arguments["channel_mult"]),
        "attention_resolutions": ",".join(map(str, arguments["attn_resolutions"])),
        "class_cond": label_dim > 0,
        "num_classes": label_dim,
        "learn_sigma": False,
        "training_mode": "edm",
    }


def _arguments_of(model: Record, source: str) -> dict[str, Any]:
    """What the network was made with.

    :raises UserError: for arguments that this toolkit does not have.
    """
    in_order, defaults, fixed = lookup(SIGNATURES, model.class_name, f"network in {source}")
    positional = tuple(model.state.get("_init_args") or ())
    given = dict(zip(in_order, positional)) | dict(model.state.get("_init_kwargs") or {})
    strange = [name for name in given if name not in (*defaults, *NOT_FOR_SAMPLING, *fixed)]
    strange += [f"number {number}" for number in range(len(in_order), len(positional))]
    missing = [name for name, value in (defaults | given).items() if value is REQUIRED]
    if strange or missing:
        raise UserError(f"{source} contains a {model.class_name} that differs from EDM's: "
                        f"unknown arguments {strange}, missing {missing}")
    for name, value in fixed.items():
        _demand(given.get(name, value) == value, source, name, given.get(name), value)
    return defaults | given


def _demand_constants(net: Record, constants: Mapping[str, float], source: str) -> None:
    """:raises UserError: unless the constants of a preconditioning are those of its formulas here."""
    for name, value in constants.items():
        _demand(net.state.get(name, value) == value, source, name, net.state.get(name), value)


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
        raise UserError(f"{source} was made with {name}={value!r}; this toolkit supports only {legal!r}")
