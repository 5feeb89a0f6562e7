"""Files that appear whole or not at all, on local disks and, through blobfile, in object stores."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from cm.errors import UserError

PARTIAL = ".partial"
"""What the name of a file ends in that is being written."""
RETRIES = 12
"""Attempts to reach an object store, with pauses that double up to a minute; blobfile itself would never give up."""


@cache
def blobs() -> ModuleType:
    """blobfile, set to give up in the end; imported only for a URL, because that takes a while."""
    import blobfile

    blobfile.configure(retry_limit=RETRIES)
    return blobfile


def is_remote(path: str) -> bool:
    return "://" in str(path)


def open_file(path: str, mode: str = "rb", *, random_access: bool = False) -> IO[Any]:
    """Open a path or a URL.

    :param random_access: read from any place in it; an object store's file is then fetched to this machine first.
    """
    if not is_remote(path):
        return open(path, mode)
    if random_access:
        return blobs().BlobFile(path, mode, streaming=False)
    return blobs().BlobFile(path, mode, partial_writes_on_exc=False)      # what cannot be finished must not appear


def join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}" if is_remote(directory) else os.path.join(directory, name)


def exists(path: str) -> bool:
    """Whether there is such a file.

    :raises UserError: for a URL of a kind that blobfile cannot read.
    """
    if is_remote(path):
        try:
            return blobs().exists(path)
        except blobs().Error as error:
            raise UserError(f"{path} cannot be looked up ({error}); download it and give the local file") from None
    return os.path.exists(path)


def is_directory(path: str) -> bool:
    return blobs().isdir(path) if is_remote(path) else os.path.isdir(path)


def absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


def remove(path: str) -> None:
    """Remove a file; no complaint if there is none."""
    if is_remote(path):
        if blobs().exists(path):
            blobs().remove(path)
        return
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def rename(path: str, new: str) -> None:
    if is_remote(path):
        blobs().copy(path, new, overwrite=True)
        blobs().remove(path)
    else:
        os.replace(path, new)


def list_names(directory: str) -> list[str]:
    """Names in a directory; none if it does not exist."""
    if is_remote(directory):
        return [name.rstrip("/") for name in blobs().listdir(directory)] if blobs().exists(directory) else []
    return os.listdir(directory) if os.path.isdir(directory) else []


def make_folder(path: str) -> None:
    """Create a folder, with those above it, unless it is there; object stores need none.

    :raises UserError: if that cannot be done.
    """
    try:
        if not is_remote(path):
            os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}") from None


class Checksum:
    """A file being written, with its size and CRC-32 so far."""

    def __init__(self, file: IO[bytes]):
        self.file, self.size, self.crc32 = file, 0, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.size += len(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        self.file.write(view)
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def write_whole(path: str, write: Callable[[Checksum], None]) -> dict[str, int]:
    """Let `write` fill a file that appears under `path` only when it is complete and on disk.

    :return: {"size": bytes, "crc32": checksum}.
    :raises UserError: if the disk is full or the folder cannot be written; what stood under `path` stays.
    """
    if is_remote(path):
        return write_remote(path, write)
    partial = f"{path}{PARTIAL}"
    try:
        with open(partial, "wb") as file:
            out = Checksum(file)
            write(out)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(os.path.dirname(os.path.abspath(path)))
    except (OSError, RuntimeError) as error:                # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            remove(partial)
        raise UserError(f"cannot write {path}: {error}{free_space(path)}") from error
    return {"size": out.size, "crc32": out.crc32}


def write_remote(path: str, write: Callable[[Checksum], None]) -> dict[str, int]:
    """As `write_whole`; an object store shows an object only when it is complete."""
    try:
        with open_file(path, "wb") as file:
            out = Checksum(file)
            write(out)
    except Exception as error:                              # each store and network library has errors of its own
        raise UserError(f"cannot write {path}: {type(error).__name__}: {error}") from error
    return {"size": out.size, "crc32": out.crc32}


def sync_directory(directory: str) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_bytes(directory: str) -> int | None:
    """What is left on the disk of a folder; None for an object store, and for a folder that cannot be asked."""
    if is_remote(directory):
        return None
    try:
        stat = os.statvfs(os.path.abspath(directory))
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def free_space(path: str) -> str:
    free = free_bytes(os.path.dirname(path))
    return "" if free is None else f". {free / 2**20:.1f} MiB are free there"


def checksum(path: str) -> dict[str, int]:
    """Size and CRC-32 of a file as it lies there; of a folder, those of all files within, one after the other."""
    is_folder = not is_remote(path) and os.path.isdir(path)
    files = sorted(str(file) for file in Path(path).rglob("*") if file.is_file()) if is_folder else [path]
    size = crc32 = 0
    for name in files:
        with open_file(name) as file:
            while block := file.read(1 << 22):
                size += len(block)
                crc32 = zlib.crc32(block, crc32)
    return {"size": size, "crc32": crc32}


def files_under(folder: str) -> list[str]:
    """Paths of all files below a folder, relative to it, with slashes."""
    tree: Iterator[Any] = blobs().walk(folder) if is_remote(folder) else walk(folder)
    return [f"{root}/{name}".replace(os.sep, "/")[len(folder) + 1 :] for root, _, names in tree for name in names]


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk that follows links to folders, but takes each folder once: a link may lead back to where it lies."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        place = os.stat(root)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        yield root, folders, names


def write_json(path: str, content: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(content, indent=2).encode()))
