"""Whether the threads of this process get the cores that they ask for, by Linux's own account.

Threads that compute one step together wait for the slowest of them at every barrier, some hundred times a step. Where
other programs use the same cores, a step can take ten times as long and more; nothing else shows why.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch as th

THREADS = Path("/proc/self/task")
BUSY_SHARE = 1 / 3
"""Largest share of waiting in the time that threads could compute; on cores of its own, a run is below 0.1."""
WINDOW_S = 5.0
"""Seconds in which threads could compute, all threads together, before anything is said."""


class ThreadTimes(NamedTuple):
    """Seconds of all threads of this process together, since each began."""

    ran: float
    waited: float                                           # ready to run, and no core was free


def thread_times(threads: Path = THREADS) -> ThreadTimes | None:
    """The counters of the kernel for the existing threads; None if it has none."""
    ran = waited = 0
    for schedstat in threads.glob("*/schedstat"):
        try:
            nanoseconds = schedstat.read_text().split()
            ran, waited = ran + int(nanoseconds[0]), waited + int(nanoseconds[1])
        except (OSError, IndexError, ValueError):           # a thread that has just ended
            continue
    return ThreadTimes(ran / 1e9, waited / 1e9) if ran else None


class CoreWatch:
    """Says once that other programs use the cores of this process.

    :param threads: with which torch computes on the CPU; a single one has no other to wait for.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.since = thread_times() if threads > 1 else None

    @classmethod
    def of(cls, device: th.device) -> CoreWatch:
        """The watch for networks on this device."""
        return cls(th.get_num_threads() if device.type == "cpu" else 1)

    def warning(self) -> str:
        """The warning, if it is due; else empty."""
        if self.since is None or (now := thread_times()) is None:
            return ""
        ran, waited = now.ran - self.since.ran, now.waited - self.since.waited
        if ran + waited < WINDOW_S:
            return ""
        self.since = now
        if waited < BUSY_SHARE * (ran + waited):
            return ""
        self.since = None                                   # once is enough
        share = waited / (ran + waited)
        return (
            f"warning: the {self.threads} threads of this run wait {share:.0%} of their time for a core, because other "
            "programs use the same cores. Steps may take many times as long as on free cores; OMP_NUM_THREADS=1 before "
            "the command may be faster"
        )
