"""Child processes that stop when their parent dies, even by SIGKILL."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1                                        # <linux/prctl.h>


def stop_with_parent(signum: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """The `preexec_fn` of a child that gets this signal when the thread that starts it ends, with or without its
    process.

    The kernel sends it to the child alone, not to the child's own children: mpiexec passes SIGTERM on to its ranks.

    :return: None on systems other than Linux, which cannot do this.
    """
    if not sys.platform.startswith("linux"):
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None, use_errno=True).prctl        # looked up before the fork

    def ask_for_signal() -> None:
        prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
        if os.getppid() != parent:                          # it died in between
            os.kill(os.getpid(), signum)

    return ask_for_signal
