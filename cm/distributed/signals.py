"""A request to stop: SIGTERM, SIGINT, SIGHUP or SIGUSR1 ends training after the current step, with a checkpoint.

    signals.listen()                        # before the imports that take seconds
    ...
    signum = agree_with_the_other_ranks(signals.requested())

A signal is only recorded here. A rank that is blocked in a message to its peers cannot run Python's signal handlers,
so a thread records the signal: the C-level handler writes to it. The thread also watches the time: if
the ranks have not agreed to stop within the grace period, because one of them hangs, it ends the job.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

from cm.distributed import failure, launchers
from cm.io import terminal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE_S = 60.0
"""Default time between a stop signal and all ranks agreeing to stop; time spent saving is not counted."""
LOADER_S = 5
"""Time that a loader process continues after SIGTERM: the signal may have gone to all processes of a job."""
TICK_S = 0.05


class _State:
    """The signal that was received, and what the ranks have done about it since."""

    def __init__(self) -> None:
        self.signum = 0
        self.since = 0.0                    # when the grace period began
        self.grace_s = GRACE_S
        self.unhurried = 0                  # how many saves are under way
        self.stepping = False               # whether the run has made a step
        self.agreed = False
        self.receiver: socket.socket | None = None


_state = _State()


def listen() -> None:
    """From now on, record the signals instead of ending this process. Call it in the main thread.

    A second SIGINT ends the job at once. SIGHUP, which a closed terminal sends, stays ignored if it is (nohup).
    After the terminal has been closed, output to stdout and stderr is dropped.
    """
    terminal.guard(lossy=True)
    if _state.receiver is not None:
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    _state.receiver = receiver
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)        # first: `_ignore` alone would lose a signal
    for signum in SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _ignore)
    threading.Thread(target=_watch, args=(receiver,), name="stopping", daemon=True).start()
    os.register_at_fork(after_in_child=_reset_in_child)


def requested() -> int:
    """The number of the first signal that this process got, or 0."""
    return _state.signum


def allow(grace_s: float) -> None:
    """Set the grace period, in seconds."""
    _state.grace_s = grace_s


def stepping() -> None:
    """Record that a step has been completed, so that there is something to save."""
    _state.stepping = True


def agreed() -> None:
    """Record that all ranks are about to save and end: the grace period no longer applies."""
    _state.agreed = True


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """While a checkpoint is written the grace period does not run; it starts again after it."""
    _state.unhurried += 1
    try:
        yield
    finally:
        _state.unhurried -= 1
        _state.since = time.monotonic()


def outlive_the_signal() -> None:
    """In a loader process, let SIGTERM end it only after a while, so that its parent can finish the step."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LOADER_S))


def _ignore(*_: object) -> None:
    """Do nothing: without a Python handler, the signal would have its default effect."""


def _reset_in_child() -> None:
    """Undo `listen` in a forked process: it has no such thread, and must not write to its parent's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # they reach it too; its parent decides when it ends
        signal.signal(signum, signal.SIG_IGN)


def _watch(receiver: socket.socket) -> None:
    while True:
        ready, _, _ = select.select([receiver], [], [], TICK_S if _state.signum else None)
        for signum in receiver.recv(64) if ready else b"":
            if signum in SIGNALS:
                _record(signum)
        if _is_overdue():
            _end(failure.Overdue(
                f"no stop within {_state.grace_s:g} s of {name_of(_state.signum)}: some rank hangs, or a step takes "
                "longer than that (--grace_seconds); the newest checkpoint is unchanged"
            ))


def _record(signum: int) -> None:
    if not _state.signum:
        _state.since, _state.signum = time.monotonic(), signum
        if launchers.launcher_rank() == 0:
            again = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
            when = "after this step, with a checkpoint" if _state.stepping else "as soon as training has begun"
            failure.say(f"\n{name_of(signum)}: stopping {when}{again}")
    elif signum == signal.SIGINT:
        _end(KeyboardInterrupt())


def _is_overdue() -> bool:
    running = _state.signum and not _state.agreed and not _state.unhurried
    return bool(running) and time.monotonic() - _state.since > _state.grace_s


def _end(error: BaseException) -> None:
    """End the job as a failed thread does."""
    try:
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, threading.current_thread())))
    finally:
        os._exit(failure.status_of(error))


def name_of(signum: int) -> str:
    """15 -> 'SIGTERM'."""
    return signal.Signals(signum).name
