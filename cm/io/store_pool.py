"""HTTP connections to object stores that give up on a host that never answers."""

from __future__ import annotations

import os
import time
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ProxyError

from cm.errors import UserError

CONNECT_TIMEOUT_S = 5
PATIENCE_S = 8.0
"""Time after which a host that has never answered is given up; with the last pause and attempt, at most 17 s pass."""
ATTEMPTS = 8                                                # the pauses between them sum to 6.3 s at most


class StorePool:
    """The part of urllib3.PoolManager that blobfile uses.

    blobfile repeats a failed request after pauses that grow to a minute, which suits a store that is busy or away for a
    moment. A host that has not answered once in this process is more likely unreachable or misspelt.
    """

    def __init__(self) -> None:
        self._process, self._pool = 0, urllib3.PoolManager()
        self._answered: set[str] = set()
        self._failures: dict[str, tuple[float, int]] = {}   # host -> start of its first failed attempt, and how many

    def request(self, method: str, url: str, **options: Any) -> Any:
        """As `urllib3.PoolManager.request`.

        :raises UserError: for a host that cannot be reached.
        """
        host, start = urlsplit(url).hostname or url, time.monotonic()
        try:
            response = self._own_pool().request(method, url, **options)
        except (ConnectTimeoutError, NewConnectionError, ProxyError) as error:
            if host not in self._answered:
                self._count_failure(host, start, error)
            raise
        self._answered.add(host)
        return response

    def _own_pool(self) -> urllib3.PoolManager:
        """One for each process: connections must not be shared after a fork."""
        if self._process != os.getpid():
            self._process, self._pool = os.getpid(), urllib3.PoolManager()
        return self._pool

    def _count_failure(self, host: str, start: float, error: Exception) -> None:
        since, count = self._failures.get(host, (start, 0))
        seconds = time.monotonic() - since
        if seconds < PATIENCE_S and count + 1 < ATTEMPTS:
            self._failures[host] = since, count + 1
            return
        self._failures.pop(host, None)
        raise UserError(
            f"{host} cannot be reached ({type(error).__name__}, {count + 1} attempts in {seconds:.0f} s): check the "
            "network and the address, or use a local path"
        ) from error
