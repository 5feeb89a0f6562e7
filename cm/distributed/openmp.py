"""How torch's threads wait for each other on the CPU: they spin for a short time, then sleep.

OpenMP threads spin at every barrier, for a few milliseconds (GCC's libgomp, in torch's wheels for Linux) or for 200
(LLVM's and Intel's). If other programs use the same cores, a spinning thread keeps the thread that it waits for from
running, and a step takes up to a hundred times as long. `benchmarks/busy_threads.py` measures it.

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
