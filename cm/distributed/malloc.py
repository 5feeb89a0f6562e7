"""How the C library keeps memory that a process has freed.

glibc returns large blocks to the system as soon as they are freed, so the activations of the next step need new pages,
each of which costs a page fault and is first filled with zeros. Blocks that are kept are reused by the next step, and
the peak memory does not change.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3                     # names of mallopt(3), from glibc's malloc.h
KEPT = 2**31 - 1                                            # bytes free at the end of the heap; the largest it takes
LARGEST = 2**25                                             # bytes of a block that may be kept; the largest it takes
BY_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_blocks(env: Mapping[str, str] = os.environ) -> bool:
    """Ask the C library to keep freed blocks of up to 32 MiB.

    :return: whether it does so; False if the user has set one of `BY_THE_USER`, or the C library is not glibc.
    """
    if any(name in env for name in BY_THE_USER):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):            # musl, macOS, Windows
        return False
    return bool(set_option(TRIM_THRESHOLD, KEPT)) and bool(set_option(MMAP_THRESHOLD, LARGEST))
