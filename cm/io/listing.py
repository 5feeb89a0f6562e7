"""The files of a local folder and its sub-folders, in the order of their paths, without a Python string for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from cm.io.names import CODEC

Listing = Iterator[tuple[bytes, bool]]                              # names, and whether each is a folder


def files_in_order(folder: str, wanted: Callable[[bytes], bool]) -> Iterator[bytes]:
    """Paths below a folder, relative to it, with slashes, ordered part by part; encoded by `cm.io.names.CODEC`.

    Links to folders are followed, but each folder is taken once: a link may lead back to where it lies. A folder that
    may not be listed counts as empty.

    :param wanted: whether a file of this name, without its folders, is among them.
    """
    seen: set[tuple[int, int]] = set()
    open_folders = [(b"", _listing(os.fsencode(folder), wanted, seen))]
    while open_folders:
        prefix, listing = open_folders[-1]
        for name, is_folder in listing:
            if is_folder:
                below = os.fsdecode(folder) + "/" + (prefix + name).decode(*CODEC)
                open_folders.append((prefix + name + b"/", _listing(os.fsencode(below), wanted, seen)))
                break
            yield prefix + name
        else:
            open_folders.pop()


def _listing(path: bytes, wanted: Callable[[bytes], bool], seen: set[tuple[int, int]]) -> Listing:
    """The entries of a folder by name; empty if the folder was visited before."""
    folders, files = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                (folders if _is_folder(entry) else files).append(entry.name)
    except OSError:
        return
    place = os.stat(path)
    if (place.st_dev, place.st_ino) in seen:
        return
    seen.add((place.st_dev, place.st_ino))
    is_folder = set(map(_portable, folders))
    files = [name for name in map(_portable, files) if wanted(name)]
    for name in sorted([*files, *is_folder]):
        yield name, name in is_folder


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _portable(name: bytes) -> bytes:
    """A name of the file system in the encoding of `CODEC`."""
    return name if name.isascii() else os.fsdecode(name).encode(*CODEC)
