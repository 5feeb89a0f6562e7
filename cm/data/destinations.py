"""Destinations of converted data sets: a zip or a folder that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cm.data.class_names import CLASS_NAMES, ClassNames
from cm.data.labels import LABEL_FILE
from cm.errors import UserError
from cm.io import atomic, storage
from cm.io.outputs import Output

ZIP_DATE = (1980, 1, 1, 0, 0, 0)                # the first that a zip can hold: a member has no date


class Destination(Protocol):
    """Where files are written; it appears under its name only when it is complete."""

    def write(self, name: str, data: bytes) -> None:
        """Add a file; `name` may have one folder in it."""
        ...

    def finish(self) -> None:
        """Let the destination appear."""
        ...

    def give_up(self) -> None:
        """Remove what was written."""
        ...


class ZipDestination:
    """A zip of stored members without dates, so that the same images are the same bytes."""

    def __init__(self, path: Path):
        storage.make_folder(path.parent)
        atomic.remove_temporaries(path)
        self.target = atomic.AtomicFile(path)
        self.archive = zipfile.ZipFile(self.target.file, "w", zipfile.ZIP_STORED)

    def write(self, name: str, data: bytes) -> None:
        """Add a member."""
        member = zipfile.ZipInfo(name, ZIP_DATE)
        member.external_attr = 0o644 << 16                          # otherwise nobody may read the unpacked file
        self.archive.writestr(member, data)

    def finish(self) -> None:
        """Let the zip appear."""
        self.archive.close()
        self.target.commit()

    def give_up(self) -> None:
        """Remove the unfinished zip."""
        with contextlib.suppress(OSError):                          # its directory may not fit on the disk either
            self.archive.close()
        self.target.discard()


class FolderDestination:
    """A folder, which must be new or empty."""

    def __init__(self, path: Path):
        self.path, self.partial = path, Path(atomic.temporary_path(str(path)))
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"--dest {path} already exists: an existing folder must be empty")
        atomic.remove_temporaries(path)
        self.partial.mkdir(parents=True)

    def write(self, name: str, data: bytes) -> None:
        """Add a file."""
        path = self.partial / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)                                      # in a folder that is not there yet for others

    def finish(self) -> None:
        """Let the folder appear."""
        atomic.sync_tree(self.partial)
        if self.path.exists():
            self.path.rmdir()
        self.partial.rename(self.path)
        atomic.sync_directory(self.path.parent)

    def give_up(self) -> None:
        """Remove the unfinished folder."""
        atomic.remove_tree(str(self.partial))


def open_destination(dest: str) -> Destination:
    """A zip or a folder, by the end of the name.

    :raises UserError: if it cannot be written, or is a folder that is not empty.
    """
    path = Path(dest)
    try:
        return ZipDestination(path) if _is_zip(path) else FolderDestination(path)
    except OSError as error:
        raise UserError(f"--dest {dest}: {atomic.write_failure(path, error)}") from None
    except UserError as error:
        raise UserError(f"--dest {dest}: {error}") from None


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def output_of(dest: str) -> Output:
    """What --dest stands for, to check it before the work."""
    return Output("--dest", dest, "file" if _is_zip(Path(dest)) else "folder")


def write_labels(
    target: Destination, labels: Sequence[tuple[str, Any]] | None, class_names: ClassNames,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write dataset.json, from which training reads the classes.

    :param labels: the name of each file and its label; None where there are none.
    :param class_names: of the classes, where these are numbers; left out without labels.
    :param more: what else it holds.
    """
    names = {CLASS_NAMES: list(class_names)} if labels and class_names else {}
    target.write(LABEL_FILE, json.dumps({"labels": labels or None} | names | dict(more or {})).encode())


@contextlib.contextmanager
def writing(dest: str) -> Iterator[Destination]:
    """The destination of --dest, which appears after the block, or not at all if the block raises.

    :raises UserError: if it cannot be written.
    """
    target = open_destination(dest)
    try:
        yield target
        target.finish()
    except BaseException as error:
        target.give_up()
        if isinstance(error, OSError):
            raise UserError(f"--dest {dest}: {atomic.write_failure(dest, error)}") from error
        raise
