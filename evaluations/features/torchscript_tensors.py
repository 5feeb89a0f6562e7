"""The tensors of a TorchScript file, read as data: the code in the file is not run, and neither is torch.jit.

The archive holds a pickle of the module tree, `data.pkl`, and the bytes of each storage in `data/KEY`. The pickle may
name only what torch.jit.save writes; objects become records of their attributes, and tensors are built from the bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import zipfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.io import untrusted
from cm.io.budget import PICKLE, SETTINGS, open_regular
from cm.io.pickle_scan import scan
from cm.io.pickles import Call, Record
from cm.io.torch_files import SHARED

MOST_MODULES, MOST_DIMS = 100_000, 64
DTYPES = {
    "FloatStorage": th.float32, "DoubleStorage": th.float64, "HalfStorage": th.float16, "BFloat16Storage": th.bfloat16,
    "LongStorage": th.int64, "IntStorage": th.int32, "ShortStorage": th.int16, "CharStorage": th.int8,
    "ByteStorage": th.uint8, "BoolStorage": th.bool,
}


def is_torchscript(path: str) -> bool:
    """Whether a file is an archive as torch.jit.save writes it."""
    with contextlib.suppress(*untrusted.DAMAGE), open_regular(path) as file:
        return any(name.endswith("/constants.pkl") for name in untrusted.open_zip(file).namelist())
    return False


def tensor_names(path: str) -> set[str]:
    """Names of the tensors of a module, as its state dict has them; constants are not among them.

    :raises UserError: if the file is damaged.
    """
    with _opened(path) as archive:
        return {name for name, _ in _places(archive)}


def read_module_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a module by the names of its state dict, on the CPU.

    :raises UserError: if the file is damaged, or a tensor needs more values than its storage holds.
    """
    with _opened(path) as archive:
        storages: dict[str, Tensor] = {}
        tensors, total = {}, 0
        for name, place in _places(archive):
            tensors[name] = _tensor(archive, place, storages)
            total += tensors[name].nbytes
            if total > SHARED * os.path.getsize(path):      # each is copied out of its storage, which many may share
                raise ValueError(f"its tensors would take more than {total:,} bytes")
        return tensors


def read_extra(path: str, name: str) -> bytes:
    """A file that was put into the archive by `_extra_files`; nothing if it is not there.

    :raises UserError: if the file is damaged.
    """
    with _opened(path) as archive:
        member = f"{_folder(archive)}extra/{name}"
        return untrusted.read_member(archive, member, SETTINGS.bytes) if member in archive.namelist() else b""


def check_archive(path: str) -> None:
    """Check the whole archive before anything reads it.

    :raises UserError: if its text would unpack to much more than a text has, or a part does not match its checksum.
    """
    with _opened(path) as archive:
        for name in archive.namelist():
            if name.lower().endswith(".json"):
                untrusted.read_member(archive, name, SETTINGS.bytes)
        if damaged := archive.testzip():
            raise ValueError(f"its part {untrusted.shown(damaged)} does not match its checksum; fetch or make it again")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    """The archive; what is wrong with it becomes one error."""
    try:
        with open_regular(path) as file, untrusted.open_zip(file) as archive:
            yield archive
    except (UserError, MemoryError):
        raise
    except Exception as error:                              # damaged or hostile pickles lead to many kinds
        reason = str(error).strip().split("\n")[0] or "it is damaged"
        raise UserError(f"the tensors of the TorchScript file {path} cannot be read: {reason} "
                        f"({type(error).__name__}). Nothing in it was run") from None


def _folder(archive: zipfile.ZipFile) -> str:
    """All members lie in a folder, whatever its name is: 'archive/'."""
    name = next((name for name in archive.namelist() if name.endswith("/constants.pkl")), None)
    if name is None:
        raise ValueError("it has no constants.pkl")
    return name.removesuffix("constants.pkl")


# --- the module tree -------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the values of a tensor lie; strides and offset in values, not bytes."""

    dtype: th.dtype
    key: str
    count: int                                              # values of the storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _place(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> Place:
    """What `torch._utils._rebuild_tensor_v2` is called with; requires_grad and hooks are left out."""
    kind, dtype, key, _, count = storage
    if kind != "storage" or not isinstance(dtype, th.dtype):
        raise pickle.UnpicklingError("a tensor without a storage")
    numbers = [count, offset, *shape, *strides]
    if not all(isinstance(each, int) and 0 <= each < 2**62 for each in numbers) or len(shape) > MOST_DIMS:
        raise pickle.UnpicklingError(f"a tensor of shape {untrusted.shown(shape)}")
    return Place(dtype, str(key), count, offset, tuple(shape), tuple(strides))


def _nothing(*_: Any) -> None:
    """For plain attributes and hooks: lists of numbers, typed dicts and others that hold no tensors of a state dict."""


ALLOWED = {
    "torch._utils._rebuild_tensor_v2": Call(_place),
    "collections.OrderedDict": Call(_nothing),
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **{f"torch.jit._pickle.{name}": Call(_nothing) for name in (
        "build_boollist", "build_doublelist", "build_intlist", "build_tensorlist", "restore_type_tag",
    )},
}


class Reader(pickle.Unpickler):
    """Rebuilds records and places.

    :raises pickle.UnpicklingError: for a name that torch.jit.save would not write, before anything is done with it.
    """

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name of the pickle; the classes of the file itself are records."""
        full = f"{module}.{name}"
        if full.startswith("__torch__."):
            return Record
        if full not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {full}, which no module's tensors need")
        return ALLOWED[full]

    def persistent_load(self, pid: Any) -> Any:
        """The description of a storage as it stands."""
        return pid


def _places(archive: zipfile.ZipFile) -> list[tuple[str, Place]]:
    """Names and places of the tensors in the attributes of the module and of those within it."""
    tree = untrusted.read_member(archive, f"{_folder(archive)}data.pkl", PICKLE.bytes)
    scan(io.BytesIO(tree))
    found, waiting, seen = [], [("", Reader(io.BytesIO(tree)).load())], 0
    while waiting:
        prefix, record = waiting.pop()
        seen += 1
        if seen > MOST_MODULES:                             # a module may stand at several places; a short file at many
            raise ValueError(f"it has more than {MOST_MODULES:,} modules")
        for name, value in record.state.items() if isinstance(record.state, dict) else ():
            if isinstance(value, Place):
                found.append((f"{prefix}{name}", value))
            elif isinstance(value, Record):
                waiting.append((f"{prefix}{name}.", value))
    return found


# --- values ----------------------------------------------------------------------------------------------------------


def _tensor(archive: zipfile.ZipFile, place: Place, storages: dict[str, Tensor]) -> Tensor:
    """A tensor of the archive; one that would repeat the values of its storage is refused."""
    if place.key not in storages:
        with untrusted.open_member(archive, f"{_folder(archive)}data/{place.key}") as (member, size):
            storages[place.key] = _bytes(member, size)
    content, size = storages[place.key], place.dtype.itemsize
    values = content[: len(content) // size * size].view(place.dtype)
    needed = math.prod(place.shape)
    if needed > len(values) or place.count > len(values):
        raise ValueError(f"a tensor of {needed:,} values has a storage of {len(values):,}")
    return values.as_strided(place.shape, place.strides, place.offset).clone()


def _bytes(member: IO[bytes], size: int) -> Tensor:
    content = np.empty(size, np.uint8)
    untrusted.read_into(member, content)
    return th.from_numpy(content)
