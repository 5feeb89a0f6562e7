"""Files that are named by an https address: downloaded once into a cache on this machine, then read from there.

    https://host/path/model.pkl                         any file
    https://host/path/model.pkl#sha256=0123abcd...      only this very file

Addresses of object stores (https://ACCOUNT.blob.core.windows.net/...) are not downloaded here: `cm.io.storage` reads
them in place. Nothing is sent but the request, and what arrives is read as any other untrusted file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from cm.errors import UserError
from cm.io import atomic

CACHE_VARIABLE = "CM_CACHE"
TIMEOUT_S = 30.0
"""Time limit for the connection, and for any pause of the server."""
LIMIT_BYTES = 16 * 2**30
"""The largest file that is downloaded."""
BLOCK_BYTES = 2**20
ADDRESS = re.compile(r"https?://", re.IGNORECASE)
OBJECT_STORE = ".blob.core.windows.net"
PIN = re.compile(r"sha256=([0-9a-f]{8,64})", re.IGNORECASE)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_address(path: str) -> bool:
    """Whether a path is an address that `local_copy` downloads."""
    host = urllib.parse.urlsplit(path).hostname if ADDRESS.match(path) else None
    return host is not None and not host.endswith(OBJECT_STORE)


def cache_folder() -> Path:
    """$CM_CACHE, or a folder in the user's cache."""
    own = os.environ.get(CACHE_VARIABLE)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own) if own else base / "consistency-toolkit"


def local_copy(
    path: str, say: Callable[[str], None], limit: int = LIMIT_BYTES, timeout_s: float = TIMEOUT_S
) -> str:
    """The local copy of the file at a URL; any other path is returned unchanged.

    It is downloaded unless it is there. Processes that ask at the same time wait for one of them.

    :param say: is told what has been downloaded, with its hash.
    :param limit: the largest file that is accepted, in bytes.
    :raises UserError: if it cannot be had, is larger than that, or is not the file that #sha256= names.
    """
    if not is_address(path):
        return path
    address, _, fragment = path.partition("#")
    pin = PIN.fullmatch(fragment)
    if fragment and not pin:
        raise UserError(f"{path}: what follows # must be sha256= and at least 8 hexadecimal digits")
    wanted = pin[1].lower() if pin else ""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme.lower() == "http" and parts.hostname not in LOOPBACK and not wanted:
        raise UserError(f"{path}: anybody on the network can change a download over plain http; give https, or the "
                        "hash of the file: #sha256=...")
    name = re.sub(r"[^\w.+=-]", "_", urllib.parse.unquote(os.path.basename(parts.path)))[-100:] or "file"
    folder = cache_folder() / hashlib.sha256(address.encode()).hexdigest()[:16]
    file = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            facts = _facts(file)
            if facts is None:
                facts = _download(address, file, limit, timeout_s)
                say(f"{address}: {facts['size']:,} bytes, now {file}; to accept only this file, add "
                    f"#sha256={facts['sha256']}")
    except OSError as error:
        raise UserError(f"{address} cannot be kept in {folder}: {error.strerror or error}; set {CACHE_VARIABLE} to "
                        "another folder") from None
    if not facts["sha256"].startswith(wanted):
        raise UserError(f"{file}, downloaded from {address}, has the SHA-256 {facts['sha256']}, not {wanted}...: it is "
                        "not the expected file; delete it to download it again")
    return str(file)


def _facts(file: Path) -> dict[str, Any] | None:
    """The facts about a downloaded file; None if it does not exist, or was changed after the download."""
    try:
        facts = json.loads(_sidecar(file).read_text())
        return facts if file.stat().st_size == facts["size"] and isinstance(facts["sha256"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sidecar(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def _download(address: str, file: Path, limit: int, timeout_s: float) -> dict[str, Any]:
    """Download to `file`, which appears when it is complete.

    :raises UserError: if that fails.
    """
    request = urllib.request.Request(address, headers={"User-Agent": "consistency-toolkit"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            _check_room(address, answer.headers.get("Content-Length"), file, limit)
            with atomic.AtomicFile(file) as out:
                digest, size = _copy(answer, out, limit, address)
                announced = answer.headers.get("Content-Length")
                if announced and announced.isdigit() and size != int(announced):
                    raise UserError(f"{address} ended after {size:,} of {announced} bytes; try again")
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise _failure(address, error) from None
    facts = {"address": address, "size": size, "sha256": digest}
    with atomic.AtomicFile(_sidecar(file)) as out:
        out.write(json.dumps(facts).encode())
    return facts


def _check_room(address: str, announced: str | None, file: Path, limit: int) -> None:
    """:raises UserError: if a file of that size is larger than the limit, or than what the disk has left."""
    size = int(announced) if announced and announced.isdigit() else 0
    free = shutil.disk_usage(file.parent).free
    if size > limit:
        raise UserError(f"{address} has {size:,} bytes; the limit is {limit:,}; download it yourself")
    if size > free:
        raise UserError(f"{address} has {size:,} bytes, and {file.parent} has {free:,} left; free some space, or set "
                        f"{CACHE_VARIABLE} to another folder")


def _copy(answer: IO[bytes], out: IO[bytes], limit: int, address: str) -> tuple[str, int]:
    """Copy what the server sends; its SHA-256 and size.

    :raises UserError: if it is more than the limit, whatever the server announced.
    """
    digest, size = hashlib.sha256(), 0
    while block := _read(answer, address):
        size += len(block)
        if size > limit:
            raise UserError(f"{address} sends more than the limit of {limit:,} bytes; download it yourself")
        digest.update(block)
        out.write(block)
    return digest.hexdigest(), size


def _read(answer: IO[bytes], address: str) -> bytes:
    """The next block; what goes wrong here is the network's fault, not that of the disk that is written to."""
    try:
        return answer.read(BLOCK_BYTES)
    except (OSError, HTTPException) as error:
        raise _failure(address, error) from None


def _failure(address: str, error: Exception) -> UserError:
    reason = getattr(error, "reason", None) or error or type(error).__name__
    status = f"status {error.code}: " if isinstance(error, urllib.error.HTTPError) else ""
    return UserError(f"{address} cannot be downloaded ({status}{reason}): check the address and the network, or give a "
                     "local file")
