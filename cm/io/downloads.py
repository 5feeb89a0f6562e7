"""Published files of weights: where they are on this machine, and how they get there."""

from __future__ import annotations

import hashlib
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch as th

from cm.io.progress import on_terminal, say

DOWNLOAD_ERRORS = (OSError, HTTPException, RuntimeError)     # the last for a download with a wrong hash

BLOCK_BYTES = 2**20


class WeightFile(NamedTuple):
    name: str
    url: str
    sha256_prefix: str | None                               # None where the publisher names no hash


def path_of(file: WeightFile) -> Path:
    """Its path in the cache of torch.hub, which other packages share: under TORCH_HOME, or else ~/.cache/torch."""
    return Path(th.hub.get_dir()) / "checkpoints" / file.name


def download(file: WeightFile) -> None:
    """Fetch a file; it appears under its name only when it is complete and has the right hash.

    :raises OSError, http.client.HTTPException, RuntimeError: those of `DOWNLOAD_ERRORS`.
    """
    path_of(file).parent.mkdir(parents=True, exist_ok=True)
    say(f"fetching {file.url} to {path_of(file)}")
    th.hub.download_url_to_file(file.url, str(path_of(file)), file.sha256_prefix, progress=on_terminal())


def has_right_hash(file: WeightFile) -> bool:
    """Whether the file under this name has the hash of the published file, if that is known."""
    return file.sha256_prefix is None or sha256(path_of(file)).startswith(file.sha256_prefix)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def where_files_go(files: tuple[WeightFile, ...]) -> str:
    """The URL and the path of each file, for a download on another machine: a line per file."""
    return "\n".join(f"  {file.url} -> {path_of(file)}" for file in files)
