"""Checks of the files and folders that a command will write, before it does any work."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cm.errors import UserError
from cm.io import atomic, storage

OF_A_RUN = re.compile(r"\w[\w.]*\d{6,}\.pt|checkpoint_\d{6,}\.json|(config|best|classes|status|progress)\.json|"
                      r"progress\.csv|log\.txt|stats\.jsonl")
"""The files that a training run keeps in its folder."""


@dataclass(frozen=True)
class Output:
    """A place that a command will write to.

    :param flag: as the user knows it, such as --out.
    :param kind: a file, or a folder, which may be there already.
    :param beside_input: a file that may lie in an input folder, because the command would not read it there.
    """

    flag: str
    path: str | os.PathLike[str]
    kind: Literal["file", "folder"] = "file"
    beside_input: bool = False


def check_outputs(outputs: Iterable[Output], inputs: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Refuse outputs that cannot be written, or would destroy what the command reads or writes; nothing is created.

    Empty and remote paths are left out.

    :param inputs: flag -> the file or folder it names.
    :raises UserError: if an output is an input or lies in one, is another output or a file that a training run keeps,
        has the wrong kind, or its folder cannot be written.
    """
    here = [each for each in outputs if _is_local(each.path) or each.kind == "folder" and _is_stream(each.path)]
    read = {flag: path for flag, path in inputs.items() if path and _is_local(path) and os.path.exists(path)}
    taken: dict[str, Output] = {}
    for output in here:
        for flag, path in read.items():
            _check_against_input(output, flag, os.fspath(path))
        _check_kind(output)
        _check_no_run_keeps_it(output)
        _check_writable(output)
        place = _real(output.path)
        if place in taken:
            raise UserError(f"{taken[place].flag} and {output.flag} are both {output.path}: give them different names")
        taken[place] = output


def _is_local(path: str | os.PathLike[str]) -> bool:
    return bool(os.fspath(path)) and not storage.is_remote(path) and not _is_stream(path)


def _is_stream(path: str | os.PathLike[str]) -> bool:
    return atomic.is_stream(os.fspath(path))


def _real(path: str | os.PathLike[str]) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _check_against_input(output: Output, flag: str, path: str) -> None:
    out, source = _real(output.path), _real(path)
    if out == source or os.path.exists(out) and os.path.samefile(out, source):
        raise UserError(f"{output.flag} {output.path} is also the input {flag}, which would be lost: choose another "
                        f"{output.flag}")
    if not output.beside_input and os.path.isdir(source) and out.startswith(source + os.sep):
        raise UserError(f"{output.flag} {output.path} lies in the input folder {flag} {path}, where it would become "
                        f"part of the input: choose another {output.flag}")


def _check_kind(output: Output) -> None:
    path = os.path.expanduser(output.path)
    if output.kind == "file" and (os.path.isdir(path) or os.fspath(path).endswith(os.sep)):
        raise UserError(f"{output.flag} {output.path} is a folder: give the name of a file, such as "
                        f"{os.path.join(os.fspath(output.path), 'NAME')}")
    if output.kind == "folder" and os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{output.flag} {output.path} is a file: give the name of a folder, such as "
                        f"{output.path}_files, or choose another {output.flag}")


def _check_no_run_keeps_it(output: Output) -> None:
    """Refuse to overwrite files of a training run: a mistake on the command line must not destroy a checkpoint."""
    path = _real(output.path)
    folder, name = os.path.split(path)
    if output.kind != "file" or not os.path.exists(path) or not OF_A_RUN.fullmatch(name):
        return
    if any(re.fullmatch(r"progress\.(csv|json)|checkpoint_\d+\.json", other) for other in os.listdir(folder)):
        raise UserError(f"{output.flag} {output.path} is a file of the training run in {folder}, which would be lost: "
                        f"choose another {output.flag}")


def _check_writable(output: Output) -> None:
    path = _real(output.path)
    above = path if output.kind == "folder" else os.path.dirname(path)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise UserError(f"{output.flag} {output.path}: cannot create the folder {os.path.dirname(path)}, because "
                        f"{above} is a file: choose another {output.flag}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{output.flag} {output.path}: the folder {above} cannot be written: choose another "
                        f"{output.flag}, or change its permissions")
