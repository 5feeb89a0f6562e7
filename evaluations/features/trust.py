"""Which extractors may run: those that the user names. A TorchScript module is a program, and loading it runs code."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from pathlib import Path

from cm.errors import UserError
from cm.io import untrusted
from cm.io.budget import SETTINGS, open_regular, read_bytes

FLAG = "--trust_extractor"
LINE = re.compile(r"([0-9a-fA-F]{64})(\s.*)?")


def list_of_hashes() -> Path:
    """The user's list of extractors that may run, a line of sha256sum's each; it need not be there."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return folder / "consistency-toolkit" / "trusted_extractors"


def trusted_hashes() -> set[str]:
    """The SHA-256 of the extractors that the user trusts; a line that is empty or begins with # says nothing.

    :raises UserError: if the list cannot be read, or a line of it begins with no SHA-256.
    """
    path = list_of_hashes()
    try:
        lines = read_bytes(path, SETTINGS).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return set()
    except (OSError, ValueError) as error:
        raise UserError(f"the list of trusted extractors {path} cannot be read: {error}") from None
    hashes = set()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = LINE.fullmatch(line.strip())
        if found is None:
            raise UserError(f"{path}, line {number}: {untrusted.shown(line)} does not begin with a SHA-256; a line is "
                            "what sha256sum prints for a file")
        hashes.add(found[1].lower())
    return hashes


def read_program(path: str, trusted: bool) -> bytes | None:
    """Whether a program may run, and what of it: its bytes as they were hashed, or None for the file itself.

    :param trusted: the user has named this very file as trusted.
    :raises UserError: if neither that is so nor the list holds its hash; nothing of the file has run.
    """
    if trusted:
        return None
    with open_regular(path) as file:
        content = file.read()
    found = hashlib.sha256(content).hexdigest()
    if found in trusted_hashes():
        return content                                      # not read again: another file may lie there by then
    raise UserError(
        f"{path} is a TorchScript module, a program that can read and write your files, and it was not run. If you "
        f"trust whoever made it, add {FLAG} (from Python: load_extractor(..., trusted=True)), or for this file alone "
        f"`sha256sum {shlex.quote(path)} >> {shlex.quote(str(list_of_hashes()))}`; its SHA-256 is {found}"
    )
