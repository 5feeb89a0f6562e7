"""safetensors files: a JSON header with names, types, shapes and places, then the numbers. There is nothing to run."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.io import storage

TYPES = {"F64": th.float64, "F32": th.float32, "F16": th.float16, "BF16": th.bfloat16, "I64": th.int64}
NAMES = {dtype: name for name, dtype in TYPES.items()}
LONGEST_HEADER = 100 << 20


def write(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, marked as those of torch.

    :raises UserError: if the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                                 # numbers begin at a multiple of 8

    def fill(file: storage.Checksum) -> None:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy())

    storage.write_atomically(path, fill)


def read(content: Any, source: str) -> dict[str, Tensor]:
    """The tensors of a file; they share its memory.

    :param content: the whole file, writable memory such as an anonymous mmap or a bytearray.
    :raises UserError: if it is no such file, or is truncated.
    """
    view = memoryview(content)
    try:
        (length,) = struct.unpack("<Q", view[:8])
        if length > min(LONGEST_HEADER, len(view) - 8):
            raise ValueError(f"a header of {length} bytes in a file of {len(view)}")
        header = json.loads(bytes(view[8:8 + length]))
        header.pop("__metadata__", None)
        return {name: tensor_at(view, 8 + length, **entry) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source} is no whole safetensors file: {error}; fetch or write it again") from None


def tensor_at(view: memoryview, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    first, last = data_offsets
    count, kind = math.prod(shape), TYPES[dtype]
    if not 0 <= first <= last <= len(view) - start or last - first != count * kind.itemsize:
        raise ValueError(f"a tensor of shape {shape} at bytes {first} to {last}")
    if not count:
        return th.zeros(shape, dtype=kind)
    return th.frombuffer(view, dtype=th.uint8, count=last - first, offset=start + first).view(kind).reshape(shape)
