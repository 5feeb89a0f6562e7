"""A request to stop: SIGTERM, SIGINT or SIGUSR1 ends training after the step at hand, with a checkpoint.

    stopping.listen()                       # before the imports that take seconds
    ...
    signum = agree_with_the_other_ranks(stopping.requested())

A signal only leaves a word here. A rank that is blocked in a message to its peers runs no signal handler of Python's,
so the word is left by a thread, to which the C library's own handler writes; the thread also keeps the time: where
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

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_S = 60.0
"""From a signal to the agreement of all ranks to stop, unless told otherwise. A save does not count."""
LOADER_S = 5
"""A loader process that is told to end keeps serving so long: the signal may have gone to all processes of a job."""
TICK_S = 0.05


class _Word:
    """What has been heard so far."""

    def __init__(self) -> None:
        self.signum = 0
        self.since = 0.0                    # when the grace period began
        self.grace_s = GRACE_S
        self.unhurried = 0                  # how many saves are under way
        self.agreed = False
        self.ears: socket.socket | None = None


_word = _Word()


def listen() -> None:
    """From now on the signals leave a word instead of ending this process. To be called in the main thread.

    A second SIGINT ends the job at once.
    """
    if _word.ears is not None:
        return
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    _word.ears = ears
    for signum in SIGNALS:
        signal.signal(signum, _leave_it_to_the_thread)
    signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ears,), name="stopping", daemon=True).start()
    os.register_at_fork(after_in_child=_in_a_child)


def requested() -> int:
    """The number of the first signal that this process got, or 0."""
    return _word.signum


def allow(grace_s: float) -> None:
    """Set the grace period, in seconds."""
    _word.grace_s = grace_s


def agreed() -> None:
    """All ranks are about to save and leave: the grace period has served its purpose."""
    _word.agreed = True


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """While a checkpoint is written the grace period stands still, and it begins anew after it."""
    _word.unhurried += 1
    try:
        yield
    finally:
        _word.unhurried -= 1
        _word.since = time.monotonic()


def outlive_the_signal() -> None:
    """For a loader process: SIGTERM ends it only after a while, so that its parent can finish the step."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LOADER_S))


def _leave_it_to_the_thread(*_: object) -> None:
    """A handler of Python's must be there, or the signal would do what it does by default."""


def _in_a_child() -> None:
    """A forked process has no thread that listens, and must not speak to its parent's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for signum in (signal.SIGINT, signal.SIGUSR1):          # Ctrl-C reaches it too; its parent decides when it ends
        signal.signal(signum, signal.SIG_IGN)


def _watch(ears: socket.socket) -> None:
    while True:
        heard, _, _ = select.select([ears], [], [], TICK_S if _word.signum else None)
        for signum in ears.recv(64) if heard else b"":
            if signum in SIGNALS:
                _hear(signum)
        if _is_overdue():
            _end(failure.Overdue(
                f"no stop within {_word.grace_s:g} s of {name_of(_word.signum)}: some rank hangs, or a step takes "
                "longer than that (--grace_seconds); the newest checkpoint is as it was"
            ))


def _hear(signum: int) -> None:
    if not _word.signum:
        _word.since, _word.signum = time.monotonic(), signum
        if launchers.launcher_rank() == 0:
            again = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
            failure.say(f"\n{name_of(signum)}: stopping after this step, with a checkpoint{again}")
    elif signum == signal.SIGINT:
        _end(KeyboardInterrupt())


def _is_overdue() -> bool:
    running = _word.signum and not _word.agreed and not _word.unhurried
    return bool(running) and time.monotonic() - _word.since > _word.grace_s


def _end(error: BaseException) -> None:
    """End the job the way a failed thread does."""
    try:
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, threading.current_thread())))
    finally:
        os._exit(failure.status_of(error))


def name_of(signum: int) -> str:
    return signal.Signals(signum).name
