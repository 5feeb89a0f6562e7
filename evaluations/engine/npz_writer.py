"""npz files that are complete or not there, written array by array."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cm.errors import UserError


@contextlib.contextmanager
def new_npz(dest: str) -> Iterator[zipfile.ZipFile]:
    """An archive that appears under `dest` when the block ends; what stood there stays until then.

    :raises UserError: if the file cannot be written.
    """
    partial = f"{dest}.{os.getpid()}.partial"
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            yield archive
        os.replace(partial, dest)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {dest}: {error}") from error
        raise


def add_array(archive: zipfile.ZipFile, name: str, array: NDArray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
