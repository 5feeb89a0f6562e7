"""npz files written array by array, which exist only when they are complete."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from cm.io import storage


def write_npz(dest: str, fill: Callable[[zipfile.ZipFile], None]) -> None:
    """Let `fill` write the members of an archive that appears under `dest` when it is complete.

    :raises UserError: if the file cannot be written; what stood under `dest` stays.
    """
    def write(file: Any) -> None:
        with zipfile.ZipFile(cast("IO[bytes]", file), "w", zipfile.ZIP_STORED) as archive:
            fill(archive)

    storage.write_atomically(dest, write)


def add_array(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    """One member: an array without Python objects."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(cast("IO[bytes]", member), array, allow_pickle=False)


def add_arrays(archive: zipfile.ZipFile, arrays: Mapping[str, NDArray[Any]]) -> None:
    """A member for each array."""
    for name, array in arrays.items():
        add_array(archive, name, array)
