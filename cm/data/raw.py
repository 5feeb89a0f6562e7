"""Data sets in their published formats: CIFAR-10's tar of pickles, MNIST's idx files, LSUN's databases, any folder or
zip of images. They are read for conversion (`datasets/dataset_tool.py`); training reads `cm.data.sources`.

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

from cm.data.class_names import ClassNames
from cm.data.decode import decode
from cm.data.image_source import EncodedSource
from cm.data.labels import LABEL_FILE
from cm.data.sources import open_source
from cm.errors import UserError

CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_BATCHES = 5
CIFAR_SIDE = 32
MNIST_SUFFIX = "-images-idx3-ubyte.gz"
IDX_UINT8 = 0x08                                                    # type byte of an idx file
MNIST_PADDING = 2                                                   # pixels on each side: 28 becomes 32


class RawImages(Protocol):
    """N images that several processes can read: each process opens the files for itself."""

    @property
    def labels(self) -> list[Any] | None:
        """N classes or vectors, or None."""
        ...

    @property
    def class_names(self) -> ClassNames:
        """The names of the classes, where these are numbers and the names are known."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        ...

    def image(self, i: int) -> Image.Image:
        """Image i in RGB or grey (mode L). The errors of its decoder are passed on."""
        ...


class Arrays:
    """Images in memory: uint8 [N,H,W] or [N,H,W,3]."""

    class_names: ClassNames = ()

    def __init__(self, title: str, images: np.ndarray, labels: list[int]):
        self.title, self.images, self.labels = title, images, labels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """The file and the number of the image."""
        return f"{self.title} image {i}"

    def image(self, i: int) -> Image.Image:
        """Image i in RGB or grey (mode L)."""
        return Image.fromarray(self.images[i])


class EncodedFiles:
    """The images of a folder or a zip.

    Labels are those of its dataset.json. In a folder without one, the top-level folders are the classes, as in EDM.
    Otherwise the class is the part of the name before an underscore, as in guided-diffusion. A single class for all
    images counts as no labels.
    """

    def __init__(self, source: EncodedSource, is_folder: bool):
        self.source = source
        names = [source.name(i) for i in range(len(source))]
        self.labels: list[Any] | None = _json_labels(source, names)
        self.class_names = source.class_names if source.has_label_file and self.labels is not None else ()
        if self.labels is None and is_folder:
            self.labels, self.class_names = _folder_labels(names)
        if self.labels is None and source.labels is not None and (source.num_classes or 0) > 1:
            self.labels, self.class_names = source.labels.tolist(), source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        """The path of the file."""
        return self.source.name(i)

    def image(self, i: int) -> Image.Image:
        """Image i in RGB or grey (mode L)."""
        return decode(self.source.encoded(i), keep_gray=True)


class Database:
    """The images of an LSUN category, in the order of their keys.

    The database is closed after reading the keys, and opened again for the first image: a process must not use an
    lmdb database that was open when the process was forked.
    """

    labels: list[Any] | None = None
    class_names: ClassNames = ()

    def __init__(self, path: Path, limit: int | None):
        self.path = path
        self._handle: Any = None                                    # opened by the process that reads images
        with open_database(path) as database, database.begin() as transaction:
            self.keys = list(islice(transaction.cursor().iternext(keys=True, values=False), limit))

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, i: int) -> str:
        """The number and the key of the entry."""
        return f"entry {i} ({self.keys[i].decode(errors='replace')})"

    def image(self, i: int) -> Image.Image:
        """Image i in RGB or grey (mode L)."""
        self._handle = self._handle or open_database(self.path)
        with self._handle.begin(buffers=True) as transaction:
            return decode(bytes(transaction.get(self.keys[i])), keep_gray=True)


def open_raw(source: str, limit: int | None = None) -> RawImages:
    """Open a data set by its name, as EDM's tool does: `*_lmdb` (or a folder with a data.mdb), `*.tar.gz` for CIFAR-10,
    `*-images-idx3-ubyte.gz` for MNIST with its labels next to it, `*.zip`, else a folder.

    :param limit: read only so many entries of a database; other formats are always read completely.
    :raises UserError: if there is no such data set, or it is not what its name says.
    """
    path = Path(source)
    if source.endswith(".tar.gz"):
        return _open_cifar10(_existing(path))
    if source.endswith(MNIST_SUFFIX):
        return _open_mnist(_existing(path))
    if path.name.endswith("_lmdb") or (path / "data.mdb").exists():
        return Database(path, limit)
    if path.is_file() and path.suffix.lower() != ".zip":
        raise _no_data_set(source)
    encoded = open_source(source, image_size=1, flag="--source")    # the size would matter for crops only
    if not isinstance(encoded, EncodedSource):
        raise _no_data_set(source)
    return EncodedFiles(encoded, is_folder=path.is_dir())


def _no_data_set(source: str) -> UserError:
    return UserError(
        f"--source {source} is no data set to convert: name a folder, a zip, an lmdb folder, cifar-10-python.tar.gz or "
        f"train{MNIST_SUFFIX}; the two archives must be packed and have these endings, as they are downloaded"
    )


def _existing(path: Path) -> Path:
    """The path.

    :raises UserError: if there is no file.
    """
    if not path.is_file():
        raise UserError(f"--source {path}: no such file")
    return path


# ---- labels of files ----


def _json_labels(source: EncodedSource, names: list[str]) -> list[Any] | None:
    """The labels that a dataset.json gives, of any kind; None unless every image has one."""
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


def _folder_labels(names: list[str]) -> tuple[list[int] | None, ClassNames]:
    """The index of each image's top-level folder in the sorted list of them, and that list; None unless there are at
    least two.
    """
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    places = {top: i for i, top in enumerate(sorted(set(tops)))}
    return ([places[top] for top in tops], tuple(places)) if len(places) > 1 else (None, ())


# ---- CIFAR-10 ----


def _open_cifar10(path: Path) -> Arrays:
    """The 50000 training images of the python version, [N,32,32,3], with their classes.

    :raises UserError: if the archive is damaged or is not CIFAR-10, or its pickles hold more than plain arrays.
    """
    images, labels = [], []
    try:
        with tarfile.open(path, "r:gz") as archive:
            for batch in range(1, CIFAR_BATCHES + 1):
                member = f"{CIFAR_FOLDER}/data_batch_{batch}"
                file = archive.extractfile(member)
                if file is None:
                    raise KeyError(f"{member} is not a file")
                pixels, classes = _cifar_batch(file)
                images.append(pixels)
                labels += classes
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError, pickle.UnpicklingError, ValueError, TypeError,
            IndexError, AttributeError) as error:
        raise UserError(f"{path} is not cifar-10-python.tar.gz, or the download is not complete: {error}") from None
    return Arrays(path.name, np.concatenate(images), labels)


def _cifar_batch(file: IO[bytes]) -> tuple[np.ndarray, list[int]]:
    """uint8 [n,32,32,3] and n classes of one batch."""
    content = _PlainUnpickler(file, encoding="latin1").load()
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


# ---- MNIST ----


def _open_mnist(path: Path) -> Arrays:
    """The digits as grey images [N,32,32], padded with black, and their classes from the file of labels next to them.

    :raises UserError: if a file is missing or damaged.
    """
    labels_path = path.with_name(path.name.removesuffix(MNIST_SUFFIX) + "-labels-idx1-ubyte.gz")
    images, labels = _read_idx(path, 3), _read_idx(_existing(labels_path), 1)
    if len(images) != len(labels):
        raise UserError(f"{path} has {len(images)} images, and {labels_path} {len(labels)} labels")
    padding = [(0, 0), (MNIST_PADDING, MNIST_PADDING), (MNIST_PADDING, MNIST_PADDING)]
    return Arrays(path.name, np.pad(images, padding), labels.tolist())


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """A compressed idx file of bytes: two zeros, type, number of axes, lengths as big-endian int32, values.

    :raises UserError: if it is anything else, or damaged.
    """
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
    """Open an lmdb database for reading only, without a lock file, because the folder may be on a read-only disk.

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
