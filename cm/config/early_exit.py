"""What a command does before its heavy imports: answer --help, and mistakes in its flags.

    def read_flags() -> Settings: ...

    def main(settings: Settings) -> None:
        import torch                            # takes seconds
        ...

    if __name__ == "__main__":
        early_exit.run_script(read_flags, main)

This module uses neither MPI nor torch. What it does depends on the command line alone, which is the same on every rank,
so all ranks leave or all continue.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from cm.config.flags import Settings
from cm.distributed import failure, launchers, openmp, restarts, signals
from cm.distributed.launchers import launcher_rank, launcher_size
from cm.errors import UserError
from cm.io import terminal

Flags = TypeVar("Flags")

SKEW_S = 1.0
"""How far apart ranks may start: a launcher ends all when one is gone, and rank 0 must have printed before."""


def run_script(read_flags: Callable[[], Flags], main: Callable[[Flags], None]) -> None:
    """Read the flags once, import torch, and call `main` with them under `dist_util.run`."""
    flags = parse_or_exit(read_flags)
    from cm.distributed import setup

    setup.run(lambda: main(flags))


def run_training(read_flags: Callable[[], Settings], main: Callable[[Settings], None]) -> None:
    """`run_script` for training: it also saves and stops at a signal, and flags set how long ranks wait."""
    signals.listen()                                        # before the imports that take seconds
    settings = parse_or_exit(read_flags)
    from cm.distributed import setup

    setup.run(lambda: main(settings), settings.values["timeout_seconds"])


def parse_or_exit(read_flags: Callable[[], Flags]) -> Flags:
    """What `read_flags` returns. If it prints --help or finds a mistake, end: one message, and status 2 on all ranks.

    So does a mistake in what the environment says of the job (`launchers.check`).

    A mistake in a file of --config or --plugin is reported after the ranks have met: it may be missing on one machine
    only.
    """
    terminal.guard()
    openmp.wait_shortly()                                   # read when torch is imported
    if (mistake := restarts.note()) is not None:
        if launcher_rank() == 0:
            failure.say(f"not tried again, because it would fail in the same way: {mistake or 'see the message above'}")
        leave(failure.USER_STATUS)
    try:
        flags = read_flags()
        launchers.check()
        return flags
    except UserError as error:
        if any(word.partition("=")[0] in ("--config", "--plugin") for word in sys.argv[1:]):
            _fail_after_joining(error)
        if launchers.speaks():
            failure.say(f"error: {error}")
        failure.note_mistake(error)
        leave(failure.status_of(error))
    except SystemExit as leaving:
        failure.note_mistake(leaving)
        leave(failure.status_of(leaving))


def _fail_after_joining(error: UserError) -> NoReturn:
    """Connect the ranks and raise the error there, so that it ends all of them."""
    from cm.distributed import setup

    def fail() -> None:
        raise error

    setup.run(fail)
    raise error


def leave(status: int) -> NoReturn:
    """End this process; with an error among several ranks, only after rank 0 has had time to print it."""
    if status and launcher_size() > 1:
        failure.flush()
        time.sleep(SKEW_S)
    sys.exit(status)
