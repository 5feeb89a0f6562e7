"""Data sets in their published formats: CIFAR-10's tar of pickles, MNIST's idx files, LSUN's databases, any folder or
zip of images. They are read for conversion (`datasets/dataset_tool.py`); training reads `cm.data.sources`.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
from PIL import Image

from cm.data.class_names import ClassNames
from cm.data.decode import decode
from cm.data.image_source import EncodedSource
from cm.data.labels import LABEL_FILE, label_budget
from cm.data.lmdb_file import LmdbFile
from cm.data.sources import open_source
from cm.errors import UserError
from cm.io.budget import ARCHIVE, INFLATED, PICKLE, Meter, open_regular, parse_json, read_file
from cm.io.pickle_scan import scan
from cm.io.untrusted import BOMB_RATIO

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
    """The images of an LSUN category, in the order of their keys; each process opens the file for itself."""

    labels: list[Any] | None = None
    class_names: ClassNames = ()

    def __init__(self, path: Path, limit: int | None):
        self.path = path
        self._file: LmdbFile | None = None                          # opened by the process that reads images
        self.entries = list(islice(LmdbFile(path).entries(), limit))

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, i: int) -> str:
        """The number and the key of the entry."""
        return f"entry {i} ({self.entries[i].key.decode(errors='replace')})"

    def image(self, i: int) -> Image.Image:
        """Image i in RGB or grey (mode L)."""
        self._file = self._file or LmdbFile(self.path)
        return decode(self._file.value(self.entries[i]), keep_gray=True)


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
        limits = label_budget(len(names))
        pairs = parse_json(source.read(LABEL_FILE, limits.bytes), limits)["labels"] or []
        table = {str(name): label for name, label in pairs}
    except FileNotFoundError:
        return None
    except KeyError:                                                # no such member, or no labels in it
        return None
    except (OSError, ValueError, TypeError) as error:
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
        with open_regular(path) as packed, gzip.open(packed) as file:
            limit = max(INFLATED.bytes, BOMB_RATIO * path.stat().st_size)
            header = file.read(4 + 4 * axes)
            is_idx = header[:4] == bytes([0, 0, IDX_UINT8, axes]) and len(header) == 4 + 4 * axes
            shape = np.frombuffer(header[4:], ">u4").tolist() if is_idx else []
            size = math.prod(shape)
            if size > limit:
                raise UserError(f"{path} would swell to {size:,} bytes, which no images of that file size do")
            data = file.read(size + 1) if is_idx else b""
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no gzip file, or the download is not complete: {error}") from None
    if not is_idx or len(data) != size:
        raise UserError(f"{path} is not an idx file of bytes with {axes} axes, or it is cut short")
    return np.frombuffer(data, np.uint8).reshape(shape)
