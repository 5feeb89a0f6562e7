"""How torch's threads wait for each other on the CPU: for a moment, then asleep.

OpenMP's threads spin at every barrier, for milliseconds (GCC's libgomp, which torch's wheels for Linux bring) or 200 of
them (LLVM's and Intel's). Where other programs use the same cores, a thread that spins keeps the one that it waits for
from running, and a step takes up to a hundred times as long. `benchmarks/busy_threads.py` measures it.

The libraries read these variables once, when they are loaded: set them before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SHORT_WAIT = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
"""Rounds of libgomp's loop, some tens of microseconds; milliseconds of LLVM's and Intel's OpenMP."""
BY_THE_USER = ("OMP_WAIT_POLICY", *SHORT_WAIT)


def wait_shortly(env: MutableMapping[str, str] = os.environ) -> None:
    """Let threads sleep after a short spin, unless the user has set one of `BY_THE_USER`."""
    if not any(name in env for name in BY_THE_USER):
        env.update(SHORT_WAIT)
