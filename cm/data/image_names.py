"""Which files of a set are its images, and in which order: names as bytes, see `cm.io.names`."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cm.data.decode import IMAGE_SUFFIXES, images_among
from cm.data.labels import LABEL_FILE
from cm.data.latents import ARRAY_SUFFIX, arrays_among
from cm.io import storage
from cm.io.listing import files_in_order
from cm.io.names import CODEC, NameTable

ARRAYS = ARRAY_SUFFIX.encode()
SUFFIXES = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
KEY_BYTES = 2**27                                                   # of the table by which names are sorted


class Found(NamedTuple):
    """The images of a set, or its arrays if it has no images, in order, and whether a file next to them tells their
    classes.
    """

    names: NameTable
    has_label_file: bool


def is_image(name: bytes) -> bool:
    """Whether a file is an image, by its name without folders: a suffix of one, and not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(b".")


def is_array(name: bytes) -> bool:
    """Whether a file is an array of latents, by its name without folders."""
    return name.lower().endswith(ARRAYS) and not name.startswith(b".")


def images_in_folder(folder: str) -> Found:
    """The images of a local or remote folder and the folders in it, or the arrays if there are no images."""
    if storage.is_remote(folder):
        files = storage.files_under(folder)
        found = images_among(files) or arrays_among(files)
        return Found(NameTable.of(name.encode(*CODEC) for name in found), LABEL_FILE in files)
    beside = os.path.join(folder, LABEL_FILE)
    tables = (NameTable.of(files_in_order(folder, wanted)) for wanted in (is_image, is_array))
    return Found(next(filter(len, tables), NameTable.of(())), os.path.lexists(beside) and not os.path.isdir(beside))


def image_rows(names: NameTable) -> np.ndarray:
    """The rows of the images among files, int64 [N], in the order of their paths, part by part; of the same name twice,
    the last. Of the arrays if there are no images.
    """
    rows = _rows_of(names, is_image)
    return rows if len(rows) else _rows_of(names, is_array)


def _rows_of(names: NameTable, wanted: Callable[[bytes], bool]) -> np.ndarray:
    rows, is_ordered, last = array("q"), True, b""
    for row, name in enumerate(names.each_encoded()):
        if wanted(name[name.rfind(b"/") + 1 :]):
            rows.append(row)
            key = name.replace(b"/", b"\0")                         # a slash ends a part, so it comes first
            is_ordered = is_ordered and last < key
            last = key
    found = np.frombuffer(rows, np.int64)
    return found if is_ordered else _sorted(names, found)


def _sorted(names: NameTable, rows: np.ndarray) -> np.ndarray:
    """These rows by the paths of their files."""
    lengths = names.lengths[rows]
    width = int(lengths.max())
    if width * len(rows) > KEY_BYTES:                               # one long name would make all of them long
        keys = [name.replace(b"/", b"\0") for name in names.take(rows).each_encoded()]
        order = np.array(sorted(range(len(rows)), key=keys.__getitem__), np.int64)
        is_last = np.array([keys[i] != keys[j] for i, j in zip(order[:-1], order[1:])] + [True])
        return rows[order[is_last]]
    keys = names.padded(rows, width)
    letters = keys.view(np.uint8)
    letters[letters == ord("/")] = 0                                # what numpy cuts off, zeros, no image ends with
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    return rows[order[np.append(keys[:-1] != keys[1:], True)]]
