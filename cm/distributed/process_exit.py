"""The first half of the interpreter's shutdown, run early."""

from __future__ import annotations

import atexit
import threading


def run_interpreter_exit() -> bool:
    """Wait for the threads that are not daemons, then call what was registered with `atexit`.

    A job of several ranks ends by `os._exit` after this, because the static destructors of torch and MPI sometimes
    crash once all work is done. CPython does these two steps at its end in private functions
    (`threading._shutdown`, also what wakes the idle workers of a ThreadPoolExecutor, and `atexit._run_exitfuncs`) and
    has no public ones. They exist in CPython 3.10 to 3.14.

    :return: False, with nothing done, if this Python lacks one of them. The process must then end in the ordinary way,
        or what threads still write and what `atexit` closes would be lost.
    """
    wait_for_threads = getattr(threading, "_shutdown", None)
    call_exit_functions = getattr(atexit, "_run_exitfuncs", None)
    if wait_for_threads is None or call_exit_functions is None:
        return False
    wait_for_threads()
    call_exit_functions()
    return True
