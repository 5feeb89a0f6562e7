"""Data sets as their makers publish them: CIFAR-10's tar of pickles, MNIST's idx files, LSUN's databases, any folder or
zip of pictures. They are read for conversion (`datasets/dataset_tool.py`); training reads `image_sources`.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import gzip
import json
import math
import pickle
import tarfile
import zlib
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from cm.data.decode import decode
from cm.data.labels import LABEL_FILE
from cm.data.sources import EncodedSource, open_source
from cm.errors import UserError

CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_BATCHES = 5
CIFAR_SIDE = 32
MNIST_SUFFIX = "-images-idx3-ubyte.gz"
IDX_UINT8 = 0x08                                                    # type byte of an idx file
MNIST_PADDING = 2                                                   # pixels on each side: 28 becomes 32


class RawImages(Protocol):
    """N pictures that processes can share: each opens its files for itself."""

    labels: list[Any] | None                                        # N classes (or vectors); None without

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What messages call picture i."""

    def picture(self, i: int) -> Image.Image:
        """Picture i in RGB or grey (mode L). Raises whatever its decoder raises if it cannot be read."""


class Arrays:
    """Pictures in memory: uint8 [N,H,W] or [N,H,W,3]."""

    def __init__(self, title: str, images: np.ndarray, labels: list[int]):
        self.title, self.images, self.labels = title, images, labels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return f"{self.title} image {i}"

    def picture(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i])


class EncodedFiles:
    """The pictures of a folder or a zip.

    Labels are those of its dataset.json. A folder without one takes its top-level folders as classes, as EDM does. Else
    they are the start of the names before an underscore, as guided-diffusion has it. One class for all is none.
    """

    def __init__(self, source: EncodedSource, is_folder: bool):
        self.source = source
        names = [source.name(i) for i in range(len(source))]
        self.labels = json_labels(source, names)
        if self.labels is None and is_folder:
            self.labels = folder_labels(names)
        if self.labels is None and source.labels is not None and source.num_classes > 1:
            self.labels = source.labels.tolist()

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def picture(self, i: int) -> Image.Image:
        return decode(self.source.encoded(i), keep_gray=True)


class Database:
    """The pictures of an LSUN category, in the order of their keys.

    The database is closed again until the first picture is asked for: lmdb forbids a process the use of one that was
    open when it was forked.
    """

    labels = None

    def __init__(self, path: Path, limit: int | None):
        self.path = path
        self._handle: Any = None                                    # of the process that asks for pictures
        with open_database(path) as database, database.begin() as transaction:
            self.keys = list(islice(transaction.cursor().iternext(keys=True, values=False), limit))

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, i: int) -> str:
        return f"entry {i} ({self.keys[i].decode(errors='replace')})"

    def picture(self, i: int) -> Image.Image:
        self._handle = self._handle or open_database(self.path)
        with self._handle.begin(buffers=True) as transaction:
            return decode(bytes(transaction.get(self.keys[i])), keep_gray=True)


def open_raw(source: str, limit: int | None = None) -> RawImages:
    """Open a data set by its name, as EDM's tool does: `*_lmdb` (or a folder with a data.mdb), `*.tar.gz` for CIFAR-10,
    `*-images-idx3-ubyte.gz` for MNIST with its labels beside it, `*.zip`, else a folder.

    :param limit: a database's first so many pictures; others are read whole.
    :raises UserError: if there is no such data set, or it is not what its name says.
    """
    path = Path(source)
    if source.endswith(".tar.gz"):
        return open_cifar10(existing(path))
    if source.endswith(MNIST_SUFFIX):
        return open_mnist(existing(path))
    if path.name.endswith("_lmdb") or (path / "data.mdb").exists():
        return Database(path, limit)
    encoded = open_source(source, image_size=1, flag="--source")    # that size is for crops, which nobody takes
    if not isinstance(encoded, EncodedSource):
        raise UserError(f"--source {source} is no data set to convert: name a folder, a zip, an lmdb folder, "
                        f"cifar-10-python.tar.gz or train{MNIST_SUFFIX}")
    return EncodedFiles(encoded, is_folder=path.is_dir())


def existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"--source {path}: no such file")
    return path


# ---- labels of files ----


def json_labels(source: EncodedSource, names: list[str]) -> list[Any] | None:
    """The labels that a dataset.json gives, whatever they are; None unless every picture has one."""
    try:
        pairs = json.loads(source.read(LABEL_FILE))["labels"] or []
        table = {str(name): label for name, label in pairs}
    except (OSError, KeyError):                                     # no such file or member, or no labels in it
        return None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{source.data_dir}: {LABEL_FILE} is not of the form {{\"labels\": [[\"name\", 0], ...]}}: {error}"
        ) from None
    labels = [table.get(name) for name in names]
    return None if None in labels else labels


def folder_labels(names: list[str]) -> list[int] | None:
    """The place of each picture's top-level folder among all of them in order; None unless there are at least two."""
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    places = {top: i for i, top in enumerate(sorted(set(tops)))}
    return [places[top] for top in tops] if len(places) > 1 else None


# ---- CIFAR-10 ----


def open_cifar10(path: Path) -> Arrays:
    """The 50000 training pictures of the python version, [N,32,32,3], with their classes.

    :raises UserError: if the archive is damaged or another one, or its pickles hold anything but plain arrays.
    """
    images, labels = [], []
    try:
        with tarfile.open(path, "r:gz") as archive:
            for batch in range(1, CIFAR_BATCHES + 1):
                member = f"{CIFAR_FOLDER}/data_batch_{batch}"
                pixels, classes = cifar_batch(archive.extractfile(member))
                images.append(pixels)
                labels += classes
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError, pickle.UnpicklingError, ValueError, TypeError,
            IndexError, AttributeError) as error:
        raise UserError(f"{path} is not cifar-10-python.tar.gz, or the download is not complete: {error}") from None
    return Arrays(path.name, np.concatenate(images), labels)


def cifar_batch(file: IO[bytes]) -> tuple[np.ndarray, list[int]]:
    """uint8 [n,32,32,3] and n classes of one batch."""
    content = PlainUnpickler(file, encoding="latin1").load()
    data, labels = content["data"].array(), content["labels"]       # [n,3072]: planes of red, green, blue
    if data.shape != (len(labels), 3 * CIFAR_SIDE**2) or not all(type(label) is int and label >= 0 for label in labels):
        raise ValueError(f"a batch has pixels {list(data.shape)} and {len(labels)} labels")
    return data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1), labels


class PickledArray:
    """What stands for a numpy array of bytes in a pickle: a record of its parts, made by no code of the pickle."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.is_fortran, self.raw = state

    def array(self) -> np.ndarray:
        """:raises ValueError: if it is anything but bytes in C order."""
        if not isinstance(self.dtype, PickledDtype) or self.dtype.name != "u1" or self.is_fortran:
            raise ValueError("its array is not of unsigned bytes in C order")
        raw = self.raw.encode("latin1") if isinstance(self.raw, str) else self.raw
        return np.frombuffer(raw, np.uint8).reshape(self.shape)


class PickledDtype:
    """What stands for a numpy dtype: its name."""

    def __init__(self, name: str, align: Any, copy: Any):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        """Byte order and padding mean nothing for bytes."""


class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of plain values and arrays of bytes; every name in it that could be called is replaced by a
    recorder of this file, and any other is an error. Nothing in the pickle runs.
    """

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda kind, shape, code: PickledArray(),
        ("numpy", "ndarray"): None,                                 # the argument `kind` above
        ("numpy", "dtype"): PickledDtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),        # how Python 3 writes bytes for 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data set has no need of")
        return self.ALLOWED[module, name]


# ---- MNIST ----


def open_mnist(path: Path) -> Arrays:
    """The digits as grey pictures [N,32,32], padded with black, with the classes of the file of labels beside them.

    :raises UserError: if a file is missing or damaged.
    """
    labels_path = path.with_name(path.name.removesuffix(MNIST_SUFFIX) + "-labels-idx1-ubyte.gz")
    images, labels = read_idx(path, 3), read_idx(existing(labels_path), 1)
    if len(images) != len(labels):
        raise UserError(f"{path} has {len(images)} images, and {labels_path} {len(labels)} labels")
    padding = [(0, 0), (MNIST_PADDING, MNIST_PADDING), (MNIST_PADDING, MNIST_PADDING)]
    return Arrays(path.name, np.pad(images, padding), labels.tolist())


def read_idx(path: Path, axes: int) -> np.ndarray:
    """A compressed idx file of bytes: two zeros, type, number of axes, lengths as big-endian int32, values."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no gzip file, or the download is not complete: {error}") from None
    header = 4 + 4 * axes
    is_idx = data[:4] == bytes([0, 0, IDX_UINT8, axes]) and len(data) >= header
    shape = np.frombuffer(data[4:header], ">i4").tolist() if is_idx else []
    if not is_idx or len(data) != header + math.prod(shape):
        raise UserError(f"{path} is not an idx file of bytes with {axes} axes, or it is cut short")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# ---- LSUN ----


def open_database(path: Path) -> Any:
    """Open for reading only, with no lock file: the folder may be on a read-only disk.

    :raises UserError: if lmdb is not installed, or there is no such database, or it is empty.
    """
    try:
        import lmdb
    except ImportError:
        raise UserError("reading LSUN's databases needs the package lmdb: pip install lmdb") from None
    if not (path / "data.mdb").exists():
        raise UserError(f"{path} is no lmdb folder: there is no {path / 'data.mdb'}")
    try:
        database = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be opened as an lmdb database: {error}; is the download complete?") from None
    if not database.stat()["entries"]:
        raise UserError(f"{path} is empty")
    return database
