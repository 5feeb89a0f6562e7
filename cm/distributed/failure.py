"""How a job of several ranks ends after a failure: one report, and every rank has ended within seconds.

Nothing here is a collective. A rank records its failure in a key-value store, which works even if the others do not
respond, and every wait has a time limit.
"""

import atexit
import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

from cm.distributed import restarts
from cm.errors import UserError
from cm.io import terminal

Result = TypeVar("Result")

LIMIT_S = 10.0
"""Time limit from the first failure to the end of this process, even if something hangs in between."""
ANSWER_S = 1.5
"""Time for the store to answer, and for the other ranks to fail in the same way."""
LEAVE_S = 0.5
"""Time between the report of a failure and the end, in which the launcher passes the report on."""
WATCH_S = 0.4
"""Time between two checks whether another rank has failed; a failed one keeps the store for at least LEAVE_S."""
SILENCE_S = 4.0
"""Time that a rank waits for the end of the job if another rank failed first."""

USER_ERRORS = (UserError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
USER_STATUS = 2
INTERRUPTED_STATUS = 130
OVERDUE_STATUS = 75                             # EX_TEMPFAIL: the same command may well succeed

CUT_OFF = ("connection reset by peer", "connection closed by peer", "broken pipe")
"""Messages of gloo on the other ranks when the process of one rank has ended without a report."""

HINTS = {
    "out of memory": "Smaller --microbatch, --use_checkpoint True or more ranks need less memory on each GPU.",
    "DataLoader worker": "A worker killed by a signal usually means that main memory or /dev/shm ran out.",
}


_ending = threading.Event()                     # set when this rank ends by itself, well or not


class Overdue(RuntimeError):
    """The ranks were asked to stop and did not in time."""


class RanksMissing(RuntimeError):
    """Ranks of the job, or the address of rank 0, did not appear in time."""


class Ranks(NamedTuple):
    """The facts and functions that are needed to end a job."""

    rank: int
    size: int
    store: Any                                  # a torch.distributed.Store, or None
    abort: Callable[[int], None]                # ends every rank with this status; may return if it cannot
    leave: Callable[[], None]                   # tells the launcher that this rank ends by itself


def status_of(error: BaseException) -> int:
    """The exit status a failure ends the program with.

    2 for an error of the user, 130 for Ctrl-C, 75 if the ranks did not stop in time, else 1.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED_STATUS
    if isinstance(error, Overdue):
        return OVERDUE_STATUS
    return USER_STATUS if isinstance(error, USER_ERRORS) else 1


def short_report(error: BaseException) -> str | None:
    """The report of a failure that needs no traceback; None if it needs one."""
    if isinstance(error, (UserError, Overdue, RanksMissing)):
        return f"error: {error}"
    if isinstance(error, RuntimeError) and "gloo" in str(error) and any(it in str(error).lower() for it in CUT_OFF):
        return ("error: another rank is gone: it was killed or has crashed, for example because memory ran out; what "
                "it said itself and the system's log tell more")
    if isinstance(error, USER_ERRORS):
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
        return f"error: {error}{place}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return str(error.code) if isinstance(error.code, str) else ""
    return None


def long_report(error: BaseException) -> str:
    """The traceback, and a hint where one is known."""
    hints = [hint for sign, hint in HINTS.items() if sign in str(error)]
    return "".join([*traceback.format_exception(error), *hints]).rstrip()


def exit_process(error: BaseException) -> None:
    """End a program of one process, if `error` has a short report; any other is left to Python's traceback."""
    report = short_report(error)
    if report is not None:
        say(report)
        note_mistake(error)
        raise SystemExit(status_of(error)) from None


def note_mistake(error: BaseException) -> None:
    """Keep torchrun from repeating an attempt that ended with an error of the user."""
    if status_of(error) == USER_STATUS:
        restarts.leave_note(short_report(error) or "")


def exit_after(seconds: float) -> None:
    """End this process after so many seconds, with the tracebacks of its threads, unless `faulthandler` cancels it."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)


def abort_job(error: BaseException, ranks: Ranks, thread: str = "") -> NoReturn:
    """Report `error` if no other rank has reported one, and end every rank.

    :param thread: the name of the thread that failed, if it is not the main one.
    """
    exit_after(LIMIT_S)
    end_by_itself()
    note_mistake(error)
    first, report = _is_first(ranks), short_report(error)
    who = f"rank {ranks.rank} of {ranks.size}" + (f", thread {thread}" if thread else "")
    if report is not None and _await_all(ranks):
        if first:
            say(report)
        _leave_together(ranks, status_of(error))
    if not first:
        time.sleep(SILENCE_S)                   # rarely passes: the first to fail ends this rank too
    if report is None:
        say(f"{who} failed{_silent_peers(error, ranks)}\n{long_report(error)}")
    elif report:
        say(f"{who}: {report}")
    flush()
    time.sleep(LEAVE_S)                         # a launcher drops what it has not yet read when the abort arrives
    ranks.abort(status_of(error))
    os._exit(status_of(error))


def watch_peers(ranks: Ranks) -> None:
    """From now on, end this rank if another has failed and this one does not notice.

    gloo fails with the first rank that is gone. NCCL waits for it until the time limit, and no launcher ends a rank
    that waits there at once: torchrun does after half a minute, and none where the ranks were started one by one.
    """
    if ranks.store is not None and ranks.size > 1:
        atexit.register(end_by_itself)          # no look at the store while the interpreter goes
        threading.Thread(target=_watch_peers, args=(ranks,), name="peers", daemon=True).start()


def end_by_itself() -> None:
    """Stop watching the other ranks: this one is about to end."""
    _ending.set()


def _watch_peers(ranks: Ranks) -> None:
    try:
        while not ranks.store.check(["failures"]):
            if _ending.wait(WATCH_S):
                return
    except RuntimeError:                        # a lost connection to the store is no failed rank
        return
    if not _ending.wait(SILENCE_S):
        say(f"rank {ranks.rank} of {ranks.size} ends: another rank has failed")
        flush()
        ranks.leave()
        os._exit(1)


def _leave_together(ranks: Ranks, status: int) -> NoReturn:
    """End this rank; every other rank ends by itself. An abort would only add messages of the launcher."""
    flush()
    # Time for the report, which a launcher cuts off once a rank is gone, and for the last reads of rank 0's store.
    time.sleep(LEAVE_S * (2 if ranks.rank == 0 else 1))
    ranks.leave()
    os._exit(status)


def flush() -> None:
    """Write out what stdout and stderr still hold; never raises."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def say(text: str) -> None:
    """Write to stderr in one piece, so that the lines of two ranks do not mix; never raises."""
    with contextlib.suppress(Exception):
        sys.stderr.write(f"{terminal.without_controls(text)}\n" if text else "")
        sys.stderr.flush()


def within(seconds: float, ask: Callable[[], Result], default: Result) -> Result:
    """`ask()`, or `default` if it fails or takes too long: the process that should answer may have ended."""
    answer = [default]

    def work() -> None:
        with contextlib.suppress(Exception):
            answer[0] = ask()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def _is_first(ranks: Ranks) -> bool:
    """Record this rank's failure; True if it is the first of the job, or if that cannot be known."""
    if ranks.store is None:
        return ranks.rank == 0

    def check_in() -> bool:
        ranks.store.set(f"failed/{ranks.rank}", "")
        return ranks.store.add("failures", 1) == 1

    return within(ANSWER_S, check_in, default=True)


def _silent(ranks: Ranks) -> list[int]:
    """Ranks that have recorded no failure."""
    return [rank for rank in range(ranks.size) if not ranks.store.check([f"failed/{rank}"])]


def _await_all(ranks: Ranks) -> bool:
    """True if every rank fails too within ANSWER_S."""
    if ranks.store is None:
        return False

    def poll() -> bool:
        while _silent(ranks):
            time.sleep(0.02)
        return True

    return within(ANSWER_S, poll, default=False)


def _silent_peers(error: BaseException, ranks: Ranks) -> str:
    """After a timeout: which ranks the others have waited for, as the end of a sentence; empty for other errors."""
    if ranks.store is None or not any(sign in str(error).lower() for sign in ("timed out", "timeout")):
        return ""
    _await_all(ranks)
    missing = within(ANSWER_S, lambda: _silent(ranks), default=[])
    return f" waiting; no word from rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else ""
