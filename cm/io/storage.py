"""Files on local disks and, through blobfile, in object stores: the one way to reach them and to write them."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any, BinaryIO, cast

from cm.errors import UserError
from cm.io import atomic, budget

RETRIES = 12
"""Attempts at a request that an object store answers with an error, with pauses that double up to a minute."""


@cache
def _blobfile() -> ModuleType:
    """blobfile, set to give up in the end and to print nothing; imported only for a URL, because that takes a while."""
    import blobfile

    from cm.io import store_pool

    pool = cast(Any, store_pool.StorePool())
    blobfile.configure(retry_limit=RETRIES, connect_timeout=store_pool.CONNECT_TIMEOUT_S, get_http_pool=lambda: pool,
                       log_callback=lambda line: None)
    return blobfile


@contextlib.contextmanager
def _store(path: str, what: str) -> Iterator[ModuleType]:
    """blobfile, for one request; each store and network library has errors of its own, which become one.

    :raises UserError: saying that `path` cannot be `what`.
    :raises FileNotFoundError, IsADirectoryError: as for a local path.
    """
    try:
        yield _blobfile()
    except UserError as error:
        raise UserError(f"{path} cannot be {what}: {error}") from error
    except (FileNotFoundError, IsADirectoryError, MemoryError):
        raise
    except Exception as error:
        reason = str(getattr(error, "message", error)).partition("\n")[0][:300]
        raise UserError(
            f"{path} cannot be {what} ({type(error).__name__}: {reason}): check the address, the network and your "
            "login to the store, or use a local path"
        ) from error


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in str(path)


def open_file(path: str, mode: str = "rb", *, random_access: bool = False) -> BinaryIO:
    """Open a path or a URL in a binary mode.

    :param random_access: read from any place in it; an object store's file is then fetched to this machine first.
    :raises OSError: for a local path, as `open`.
    :raises UserError: for a URL that cannot be opened, and for a pipe, a device or a folder that is to be read.
    """
    if not is_remote(path):
        return budget.open_regular(path) if mode == "rb" else cast(BinaryIO, open(path, mode))
    with _store(path, "opened") as blobfile:
        if random_access:
            return blobfile.BlobFile(path, mode, streaming=False)
        return blobfile.BlobFile(path, mode, partial_writes_on_exc=False)     # what cannot be finished must not appear


def size(path: str) -> int:
    """Bytes of a file.

    :raises OSError, UserError: as `open_file`.
    """
    if not is_remote(path):
        return os.stat(path).st_size
    with _store(path, "looked up") as blobfile:
        return blobfile.stat(path).size


def join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}" if is_remote(directory) else os.path.join(directory, name)


def exists(path: str) -> bool:
    """Whether there is such a file or folder.

    :raises UserError: for a URL that cannot be looked up.
    """
    if not is_remote(path):
        return os.path.exists(path)
    with _store(path, "looked up") as blobfile:
        return blobfile.exists(path)


def is_directory(path: str) -> bool:
    """Whether there is such a folder.

    :raises UserError: for a URL that cannot be looked up.
    """
    if not is_remote(path):
        return os.path.isdir(path)
    with _store(path, "looked up") as blobfile:
        return blobfile.isdir(path)


def absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


def remove(path: str) -> None:
    """Remove a file; no complaint if there is none.

    :raises OSError: if a local file cannot be removed.
    :raises UserError: if one in a store cannot be.
    """
    with contextlib.suppress(FileNotFoundError):
        if not is_remote(path):
            return os.remove(path)
        with _store(path, "removed") as blobfile:
            if blobfile.exists(path):
                blobfile.remove(path)


def rename(path: str, new: str) -> None:
    """Give a file another name in the same folder or store; what stood under that name goes.

    :raises OSError, UserError: as `remove`.
    """
    if not is_remote(path):
        return os.replace(path, new)
    with _store(path, "renamed") as blobfile:
        blobfile.copy(path, new, overwrite=True)
        blobfile.remove(path)


def list_names(directory: str) -> list[str]:
    """Names in a directory; none if it does not exist."""
    if not is_remote(directory):
        return os.listdir(directory) if os.path.isdir(directory) else []
    with _store(directory, "listed") as blobfile:
        return [name.rstrip("/") for name in blobfile.listdir(directory)] if blobfile.exists(directory) else []


def each_name(directory: str) -> Iterator[str]:
    """`list_names` as an iterator, so that a caller need not list all of a large folder."""
    if is_remote(directory) or not os.path.isdir(directory):
        yield from list_names(directory)
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            yield entry.name


def make_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder, with those above it, unless it is there; object stores need none.

    :raises UserError: if that cannot be done.
    """
    try:
        if not is_remote(path):
            os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}; choose another place for it") from None


class Checksum:
    """A file being written, with its size and CRC-32 so far, and the error if the system refuses a part of it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.size, self.crc32 = file, 0, 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.size += len(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        try:
            self.file.write(view)
        except OSError as error:
            self.failure = error
            raise
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[Checksum], Any], *, durable: bool = True
) -> dict[str, int]:
    """Let `write` fill a file that appears under `path`, local or remote, only when it is complete and on disk.

    :param durable: see `atomic.AtomicFile`; an object store is always durable.
    :return: {"size": bytes, "crc32": checksum}.
    :raises UserError: naming the path, the free space and the remedy if the file cannot be written; what stood under
        `path` stays.
    """
    if is_remote(path):
        return _write_remote(os.fspath(path), write)
    with atomic.AtomicFile(path, durable) as file:
        out = Checksum(file)
        try:
            write(out)
        except RuntimeError as error:                       # torch.save hides the reason behind an error of its own
            raise out.failure or error from error
    return {"size": out.size, "crc32": out.crc32}


def _write_remote(path: str, write: Callable[[Checksum], Any]) -> dict[str, int]:
    """`write_atomically` for any store; an object store shows an object only when it is complete."""
    try:
        with open_file(path, "wb") as file:
            out = Checksum(file)
            write(out)
    except Exception as error:                              # each store and network library has errors of its own
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"cannot write {path}: {reason}. Check your login to the store, its space and the "
            "network, or choose another folder"
        ) from error
    return {"size": out.size, "crc32": out.crc32}


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(data))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file as `write_atomically` does."""
    write_bytes(path, json.dumps(content, indent=2).encode())


def free_bytes(directory: str) -> int | None:
    """The free bytes on the disk of a folder; None for an object store, or if they cannot be found out."""
    return None if is_remote(directory) else atomic.free_bytes(directory)


def checksum(path: str) -> dict[str, int]:
    """Size and CRC-32 of a file; for a folder, of the concatenation of all files in it."""
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
    if is_remote(folder):
        with _store(folder, "listed") as blobfile:
            tree = list(blobfile.walk(folder))
    else:
        tree = walk(folder)
    return [f"{root}/{name}".replace(os.sep, "/")[len(folder) + 1 :] for root, _, names in tree for name in names]


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk that follows links to folders, but visits each folder once, since links may form a cycle."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        place = os.stat(root)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        yield root, folders, names
