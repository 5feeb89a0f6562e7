"""Files by their address: a path of this machine, or one that blobfile can read, such as gs://bucket/images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO


def is_remote(path: str) -> bool:
    return "://" in str(path)


def files_under(folder: str) -> list[str]:
    """Paths of all files below a folder, relative to it, with slashes."""
    tree: Iterator[Any] = blobfile().walk(folder) if is_remote(folder) else walk(folder)
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


def open_file(path: str) -> BinaryIO:
    """For reading, from any place in it."""
    return blobfile().BlobFile(path, "rb", streaming=False) if is_remote(path) else open(path, "rb")


def blobfile() -> Any:
    """Imported where a path needs it: for files at hand it is slow to import and five times slower to open them."""
    import blobfile

    return blobfile
