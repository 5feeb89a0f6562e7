"""CIFAR-10 in its published form: a tar of pickles, of which no code is run.

Shapes: n images of a batch.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from cm.data.raw_images import Arrays
from cm.errors import UserError
from cm.io.budget import ARCHIVE, PICKLE, Meter, open_regular, read_file
from cm.io.pickle_scan import scan

CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_BATCHES = 5
CIFAR_SIDE = 32


def open_cifar10(path: Path) -> Arrays:
    """The 50000 training images of the python version, [N,32,32,3], with their classes.

    :raises UserError: if the archive is damaged or is not CIFAR-10, or its pickles hold more than plain arrays.
    """
    wanted = [f"{CIFAR_FOLDER}/data_batch_{batch}" for batch in range(1, CIFAR_BATCHES + 1)]
    found: dict[str, tuple[np.ndarray, list[int]]] = {}
    try:
        with open_regular(path) as packed, gzip.open(packed) as unpacked:
            stream, meter = _Metered(cast(IO[bytes], unpacked)), Meter(ARCHIVE)
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as archive:
                while len(found) < CIFAR_BATCHES and (member := archive.next()):
                    meter.spend()
                    file = archive.extractfile(member) if member.name in wanted else None
                    if file:
                        found[member.name] = _cifar_batch(read_file(file, PICKLE.bytes))
        if missing := [name for name in wanted if name not in found]:
            raise KeyError(f"{missing[0]} is missing")
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError, pickle.UnpicklingError, ValueError, TypeError,
            IndexError, AttributeError) as error:
        raise UserError(f"{path} is not cifar-10-python.tar.gz, or the download is not complete: {error}") from None
    images, labels = zip(*(found[name] for name in wanted))
    return Arrays(path.name, np.concatenate(images), [label for batch in labels for label in batch])


class _Metered:
    """A stream that unpacks no more than the budget of an archive."""

    def __init__(self, file: IO[bytes]):
        self.file, self.meter = file, Meter(replace(ARCHIVE, nodes=ARCHIVE.bytes))

    def read(self, size: int) -> bytes:
        """As of a file.

        :raises ValueError: if it becomes too much.
        """
        data = self.file.read(min(size, ARCHIVE.bytes))
        self.meter.spend(size=len(data))
        return data


def _cifar_batch(pickled: bytes) -> tuple[np.ndarray, list[int]]:
    """uint8 [n,32,32,3] and n classes of one batch."""
    scan(io.BytesIO(pickled))
    content = _PlainUnpickler(io.BytesIO(pickled), encoding="latin1").load()
    data, labels = content["data"].array(), content["labels"]       # [n,3072]: planes of red, green, blue
    if data.shape != (len(labels), 3 * CIFAR_SIDE**2) or not all(type(label) is int and label >= 0 for label in labels):
        raise ValueError(f"a batch has pixels {list(data.shape)} and {len(labels)} labels")
    return data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1), labels


class _PickledArray:
    """Stands in for a numpy array of bytes in a pickle: it records the parts and runs no code of the pickle."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.is_fortran, self.raw = state

    def array(self) -> np.ndarray:
        """The numpy array.

        :raises ValueError: if it is anything but bytes in C order.
        """
        if not isinstance(self.dtype, _PickledDtype) or self.dtype.name != "u1" or self.is_fortran:
            raise ValueError("its array is not of unsigned bytes in C order")
        raw = self.raw.encode("latin1") if isinstance(self.raw, str) else self.raw
        return np.frombuffer(raw, np.uint8).reshape(self.shape)


class _PickledDtype:
    """Stands in for a numpy dtype: it records the name."""

    def __init__(self, name: str, align: Any, copy: Any):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        """Byte order and padding have no meaning for bytes."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of plain values and arrays of bytes without running any code of it.

    The names that such a pickle calls are replaced by the recorders of this module; every other name is an error.
    """

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: _PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda kind, shape, code: _PickledArray(),
        ("numpy", "ndarray"): None,                                 # the argument `kind` above
        ("numpy", "dtype"): _PickledDtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),        # how Python 3 writes bytes for 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data set has no need of")
        return self.ALLOWED[module, name]
