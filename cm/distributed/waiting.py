"""Waiting for the ranks of a job to start: a line says what a rank waits for, and a time limit ends the wait.

A launcher, a firewall or a wrong address can keep ranks away forever, and a rank that waits silently looks like one
that works.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cm.distributed import failure, launchers

NOTICE_S = 10.0
"""Time that a rank waits before it prints a message."""
PAUSE_S = 0.05
"""Time between two checks."""
SHOWN = 8                                       # missing ranks in a message


class Wait:
    """One wait of this rank, with a limit.

    :param who: "rank 1 of 8".
    """

    def __init__(self, who: str, timeout_s: float):
        self.who, self.timeout_s, self.start_time, self.told = who, timeout_s, time.monotonic(), False

    def left(self) -> float:
        """Seconds until the limit, at least 0."""
        return max(0.0, self.start_time + self.timeout_s - time.monotonic())

    def go_on(self, what: Callable[[], str], silent: bool = False) -> None:
        """Pause between two checks, and say what is waited for after NOTICE_S.

        :param what: "for ...", called only when it is shown.
        :param silent: whether another rank prints it.
        :raises RanksMissing: at the limit.
        """
        if not self.left():
            raise failure.RanksMissing(f"waited {self.timeout_s:g} s in vain {what()}")
        if not self.told and time.monotonic() - self.start_time >= NOTICE_S:
            self.told = True
            if not silent:
                failure.say(f"{self.who} waits {what()}; it gives up after {self.timeout_s:g} s")
        time.sleep(min(PAUSE_S, self.left()))


def await_address(host: str, port: int, wait: Wait) -> None:
    """Return when rank 0 answers at an address; names are looked up again and again, since they may appear late.

    :raises RanksMissing: at the limit.
    """
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(launchers.PROBE_S, max(wait.left(), PAUSE_S))):
                return
        except (OSError, UnicodeError) as error:
            reason = f"for rank 0 at MASTER_ADDR={host}, MASTER_PORT={port} ({error})"
        wait.go_on(lambda reason=reason: reason)


def await_ranks(store: Any, rank: int, size: int, place: str, wait: Wait) -> None:
    """Return when all ranks have called this with the same store; rank 0 says which are missing.

    :param place: the address of rank 0, for messages.
    :raises RanksMissing: at the limit.
    """
    with _lost_store(wait, place):
        store.set(f"here/{rank}", "")
        missing = list(range(size))
        while rank == 0 and (missing := [each for each in missing if not store.check([f"here/{each}"])]):
            wait.go_on(lambda: _missing(missing, size, place))
        if rank == 0:
            store.set("all here", "")
        while not store.check(["all here"]):
            absent = [each for each in missing if not store.check([f"here/{each}"])] if not wait.left() else []
            wait.go_on(lambda absent=absent: _missing(absent, size, place), silent=True)


@contextlib.contextmanager
def mpi_wait(who: str, timeout_s: float, give_up: Callable[[BaseException], None]) -> Iterator[None]:
    """Watch over waits inside MPI, which has neither messages nor a time limit.

    :param give_up: ends this process at the limit; called on another thread.
    """
    done, wait = threading.Event(), Wait(who, timeout_s)

    def watch() -> None:
        try:
            while not done.is_set():
                wait.go_on(lambda: "for the other ranks of its mpiexec or srun")
        except failure.RanksMissing as error:
            if not done.is_set():
                give_up(error)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def _lost_store(wait: Wait, place: str) -> Iterator[None]:
    """Give a clear error if the store of rank 0 disappears: rank 0 has given up, or was killed."""
    try:
        yield
    except failure.RanksMissing:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise failure.RanksMissing(f"lost rank 0 at {place} while waiting for the other ranks: it has ended or cannot "
                                   f"be reached ({reason})") from None


def _missing(ranks: list[int], size: int, place: str) -> str:
    """'for rank 1: 1 of 2 ranks have come to 10.0.0.1:29500'."""
    shown = ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")
    return f"for rank{'s' * (len(ranks) != 1)} {shown}: {size - len(ranks)} of {size} have come to {place}"
