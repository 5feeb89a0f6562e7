"""safetensors files: tensors by name, without any executable content."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch as th
from torch import Tensor

from cm.distributed.collectives import read_everywhere
from cm.errors import UserError
from cm.io import storage, untrusted
from cm.io.budget import HEADER, parse_json

METADATA = {"format": "pt"}                                         # these are tensors of torch
TEXTS = "__metadata__"                                              # of the header, where the texts are
LENGTH_BYTES = 8                                                    # of the header, at the start of the file
DAMAGE = (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, AssertionError)


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device.

    :param metadata: texts by name, for the header.
    :raises UserError: if the file cannot be written, or the texts are more than a reader here takes.
    """
    texts = METADATA | dict(metadata or {})
    if sum(len(text.encode()) for text in texts.values()) > HEADER.bytes // 2:      # quoted they are longer
        raise UserError(f"{path}: the header of a safetensors file can hold at most {HEADER.bytes // 2:,} bytes of "
                        "text")
    owned = {name: value.detach().cpu().clone(memory_format=th.contiguous_format) for name, value in tensors.items()}
    storage.write_bytes(path, safetensors.torch.save(owned, texts))


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a file, on every rank; only rank 0 reads it. Call it on all ranks.

    :raises FileNotFoundError: on every rank, if rank 0 does not find it.
    :raises UserError: on every rank, if it is no such file, is damaged, or has a tensor twice.
    """
    with read_everywhere(path) as content:
        data = content.read()
    return parse(data, path)


def metadata(path: str) -> dict[str, str]:
    """The texts in the header of a file, of which no more is read; for one rank.

    :raises OSError, UserError: if there is no file that can be read.
    :raises ValueError: if it has no such header.
    """
    with storage.open_file(path) as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > HEADER.bytes:
            raise ValueError(f"its header has more than {HEADER.bytes:,} bytes")
        content = parse_json(file.read(length), HEADER)
    texts = content.get(TEXTS, {}) if isinstance(content, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("its header holds no texts by name")
    return texts


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and values, in the order of the names."""
    crc32 = 0
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous().reshape(-1).view(th.uint8)
        crc32 = zlib.crc32(values.numpy().data, zlib.crc32(name.encode(), crc32))
    return crc32


def parse(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a file. The library checks sizes first: every byte belongs to exactly one tensor.

    :raises UserError: as `read`.
    """
    try:
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        header = data[LENGTH_BYTES : LENGTH_BYTES + length]
        parse_json(header, HEADER)                                  # within bounds, before anything is made of it
        json.loads(header, object_pairs_hook=refuse_duplicates)
        tensors = safetensors.torch.load(data)
    except DAMAGE as error:
        raise UserError(
            f"{source} is not a complete safetensors file ({len(data):,} bytes): {error}. Download or write it again"
        ) from None
    return tensors


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict.

    :raises ValueError: if a name is in it twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {untrusted.shown(name)} appears twice in its header")
        found[name] = value
    return found
