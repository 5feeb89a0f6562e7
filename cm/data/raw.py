"""Data sets in their published formats: CIFAR-10's tar of pickles, MNIST's idx files, LSUN's databases, any folder or
zip of images. They are read for conversion (`datasets/dataset_tool.py`); training reads `cm.data.sources`.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from cm.data.cifar10 import open_cifar10
from cm.data.class_names import ClassNames
from cm.data.decode import decode
from cm.data.image_source import EncodedSource
from cm.data.labels import LABEL_FILE, label_budget
from cm.data.lmdb_file import LmdbFile
from cm.data.mnist import MNIST_SUFFIX, open_mnist
from cm.data.raw_images import RawImages, existing
from cm.data.sources import open_source
from cm.errors import UserError
from cm.io.budget import parse_json


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
        return open_cifar10(existing(path))
    if source.endswith(MNIST_SUFFIX):
        return open_mnist(existing(path))
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
        f"--source {source} is not a data set that can be converted: give a folder, a zip, an lmdb folder, "
        f"cifar-10-python.tar.gz or train{MNIST_SUFFIX}; the two archives must be packed and have these endings, as "
        "they are downloaded"
    )


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
