"""One part of a checkpoint as a folder: every rank writes its share, and any rank reads what it needs.

The files are those of torch.distributed.checkpoint, whose `load` reads the folder too: __0_0.distcp and so on, one for
each rank that has something to write; each holds one tensor after the other, written by torch.save. torch describes
them in .metadata, a pickle, which can run any code. That file is written for torch alone; this module reads index.json,
which has the same content and a checksum for each piece.

Tensors are divided along their first axis. R is its length.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.io import budget, storage, torch_files
from cm.io.atomic import PARTIAL
from cm.io.budget import MIB, Budget

SUFFIX = ".dcp"
INDEX, METADATA = "index.json", ".metadata"
FILE = re.compile(r"__\d+_0\.distcp|index\.json|\.metadata")
"""The names of the files in such a folder."""
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
BUDGET = Budget(64 * MIB, 4_000_000)                        # of an index

Facts = dict[str, int]                                      # size and CRC-32 of a file


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor.

    :param rows: [r, ...], or a whole tensor without axes.
    :param shape: of the whole, [R, ...].
    :param start: the number of the first row.
    """

    rows: Tensor
    shape: th.Size
    start: int = 0


@dataclass
class Share:
    """The files and pieces that one rank has written to a folder."""

    files: dict[str, Facts] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_share(folder: str, rank: int, pieces: Mapping[str, Piece]) -> Share:
    """Write a rank's pieces to its file; nothing if it has none.

    :raises UserError: if the file cannot be written.
    """
    if not pieces:
        return Share()
    name, tensors = f"__{rank}_0.distcp", {}

    def write(file: storage.Checksum) -> None:
        for key, piece in pieces.items():
            packed = io.BytesIO()
            th.save(piece.rows.detach().cpu().contiguous().clone(), packed)         # a view would bring all it is of
            data = packed.getbuffer()
            place = [piece.start, len(piece.rows) if piece.rows.ndim else 1, rank, file.size, len(data)]
            tensors[key] = {
                "dtype": str(piece.rows.dtype).removeprefix("torch."), "shape": list(piece.shape),
                "chunks": [[*place, zlib.crc32(data)]],
            }
            file.write(data)

    return Share({name: storage.write_atomically(storage.join(folder, name), write)}, tensors)


def complete(folder: str, shares: Iterable[Share]) -> dict[str, Any]:
    """Write the descriptions of what all ranks have written, on one of them; the facts of the folder for a manifest.

    :raises UserError: if they cannot be written, or what a rank has written is not seen here.
    """
    files, tensors = {}, {}
    for share in shares:
        files |= share.files
        for key, entry in share.tensors.items():
            tensors.setdefault(key, entry | {"chunks": []})["chunks"] += entry["chunks"]
    for name, facts in files.items():
        path = storage.join(folder, name)
        if not storage.exists(path) or storage.size(path) != facts["size"]:
            raise UserError(f"{path}, which another rank has written, is not visible to rank 0: with "
                            "--checkpoint_format dcp all ranks write, so --checkpoint_dir must lie on a disk that all "
                            "machines share")
    index = json.dumps({"tensors": tensors}).encode()
    for name, content in ((INDEX, index), (METADATA, _for_torch(tensors))):
        files[name] = storage.write_atomically(storage.join(folder, name), lambda file, data=content: file.write(data))
    return facts_of(files)


def facts_of(files: Mapping[str, Facts]) -> dict[str, Any]:
    """The entry of a manifest for a folder of these files."""
    listing = json.dumps(files, sort_keys=True).encode()
    return {"size": sum(facts["size"] for facts in files.values()), "crc32": zlib.crc32(listing), "files": dict(files)}


def _for_torch(tensors: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The same description in the format of torch.distributed.checkpoint."""
    from torch.distributed.checkpoint import metadata as torch_metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    described, stored = {}, {}
    for key, entry in tensors.items():
        chunks = []
        for start, rows, rank, offset, length, _ in entry["chunks"]:
            sizes = th.Size([rows, *entry["shape"][1:]] if entry["shape"] else [])
            offsets = th.Size([start, *[0] * (len(sizes) - 1)] if sizes else [])
            chunks.append(torch_metadata.ChunkStorageMetadata(offsets, sizes))
            stored[torch_metadata.MetadataIndex(key, offsets)] = _StorageInfo(f"__{rank}_0.distcp", offset, length)
        properties = torch_metadata.TensorProperties(dtype=getattr(th, entry["dtype"]))
        described[key] = torch_metadata.TensorStorageMetadata(properties, th.Size(entry["shape"]), chunks)
    return pickle.dumps(torch_metadata.Metadata(described, {key: (key,) for key in tensors}, stored))


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor in a folder: `stored[a:b]` reads some rows to the CPU, `stored[...]` reads all."""

    folder: str
    key: str
    dtype: th.dtype
    shape: th.Size
    chunks: tuple[tuple[int, ...], ...]                     # first row, rows, rank, offset, bytes, CRC-32
    verify: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def detach(self) -> Stored:
        """Itself: it asks for no gradient."""
        return self

    def __getitem__(self, rows: slice | EllipsisType) -> Tensor:
        """:raises UserError: if a file is damaged."""
        if not self.shape:
            return self._read(self.chunks[0], [])
        start, stop, _ = (slice(None) if rows is ... else rows).indices(len(self))
        result = th.empty(max(0, stop - start), *self.shape[1:], dtype=self.dtype)
        for chunk in self.chunks:
            first, last = max(start, chunk[0]), min(stop, chunk[0] + chunk[1])
            if first < last:
                part = self._read(chunk, [chunk[1], *self.shape[1:]])
                result[first - start:last - start] = part[first - chunk[0]:last - chunk[0]]
        return result

    def _read(self, chunk: tuple[int, ...], shape: list[int]) -> Tensor:
        _, _, rank, offset, length, crc32 = chunk
        path = storage.join(self.folder, f"__{rank}_0.distcp")
        if offset + length > storage.size(path):            # what is asked for is set aside before it is read
            raise UserError(f"{path} ends too early: copy the folder again or take another checkpoint")
        with storage.open_file(path, random_access=True) as file:
            file.seek(offset)
            data = file.read(length)
        if self.verify and zlib.crc32(data) != crc32:
            raise UserError(f"{path} is damaged: {self.key!r} in it does not match the checksum in {INDEX}. Copy the "
                            "folder again or take another checkpoint; --verify_weights False loads it without this "
                            "check")
        try:
            found = torch_files.load(io.BytesIO(data), len(data))
            if not isinstance(found, Tensor) or (list(found.shape), found.dtype) != (shape, self.dtype):
                raise ValueError(f"{self.key!r} is not the tensor that {INDEX} describes")
        except Exception as error:                          # damaged or forged pickles and archives raise many kinds
            raise UserError(f"{path} cannot be loaded: {error} ({type(error).__name__})") from error
        return found


def open_part(folder: str, facts: Mapping[str, Any] | None = None, verify: bool = True) -> dict[str, Stored]:
    """The tensors of a folder by name, none of them read yet.

    :param facts: what its manifest lists for it, see `facts_of`.
    :param verify: compare checksums of what is read; the index's with `facts`.
    :raises UserError: if it has no index, or one that is damaged.
    """
    path = storage.join(folder, INDEX)
    try:
        with storage.open_file(path) as file:
            data = budget.read_file(file, BUDGET.bytes)
        listed = (facts or {}).get("files", {}).get(INDEX)
        if verify and listed and listed != {"size": len(data), "crc32": zlib.crc32(data)}:
            raise UserError(f"{path} is damaged or was replaced: its manifest lists another size or CRC-32. Copy the "
                            "folder again or take another checkpoint; --verify_weights False loads it without this "
                            "check")
        entries = budget.parse_json(data, BUDGET)["tensors"]
        return {key: _stored(folder, key, entry, verify) for key, entry in entries.items()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; only folders that this toolkit wrote have such a "
                        "file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of tensors: {type(error).__name__}: {error}") from None


def _stored(folder: str, key: str, entry: Mapping[str, Any], verify: bool) -> Stored:
    """:raises ValueError: unless the chunks of a tensor are its rows, each exactly once."""
    shape, chunks = entry["shape"], sorted(tuple(chunk) for chunk in entry["chunks"])
    numbers = [*shape, *(number for chunk in chunks for number in chunk)]
    if entry["dtype"] not in DTYPES or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{key!r} is no tensor")
    dtype, row = getattr(th, entry["dtype"]), 0
    for start, rows, *rest in chunks:
        if start != row or len(rest) != 4:
            raise ValueError(f"rows of {key!r} are missing")
        if math.prod([rows, *shape[1:]]) * dtype.itemsize > rest[2]:
            raise ValueError(f"{key!r} would be larger than its bytes")
        row += rows
    if row != (shape[0] if shape else 1):
        raise ValueError(f"rows of {key!r} are missing")
    return Stored(folder, key, dtype, th.Size(shape), tuple(chunks), verify)


def problem(folder: str, facts: Mapping[str, Any], verify: bool) -> str | None:
    """The problem of a folder, compared with its entry in a manifest; None if there is none.

    :param verify: compare checksums, too.
    """
    for name, expected in facts["files"].items():
        path = storage.join(folder, name)
        if not storage.exists(path):
            return f"{os.path.basename(folder)}/{name} is missing"
        found = storage.checksum(path) if verify else {"size": storage.size(path)}
        if any(expected[fact] != value for fact, value in found.items()):
            return f"{os.path.basename(folder)}/{name} is truncated or damaged (size or checksum differ)"
    return None


def remove(folder: str) -> None:
    """Remove what was written into a folder, complete or not, and then it, if nothing else is in it."""
    for name in storage.list_names(folder):
        if FILE.fullmatch(name) or name.endswith(PARTIAL):
            storage.remove(storage.join(folder, name))
    if not storage.is_remote(folder) and os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


def whole(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Read every tensor, one after the other."""
    return ((key, stored[...]) for key, stored in tensors.items())
