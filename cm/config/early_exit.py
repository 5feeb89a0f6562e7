"""What a command answers before its heavy imports: --help, and mistakes in its flags.

    def read_flags() -> Settings: ...

    if __name__ == "__main__":
        command.answer(read_flags)
    import torch                            # takes seconds

Knows nothing of MPI or torch. What it does depends on the command line alone, which is the same on every rank, so that
all ranks leave or all go on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from cm.distributed import failure
from cm.distributed.launchers import launcher_rank, launcher_size
from cm.errors import UserError

SKEW_S = 1.0
"""That ranks may start apart: a launcher ends all when one is gone, and rank 0 shall have spoken before."""


def parse_or_exit(read_flags: Callable[[], object]) -> None:
    """Leave if `read_flags` has printed --help, or finds a mistake: one message, status 2 on every rank.

    Mistakes in a --config file are left to the reading of the flags that follows, where the ranks know each other:
    the file may be missing on one machine only.
    """
    try:
        read_flags()
    except UserError as error:
        if any(word.partition("=")[0] == "--config" for word in sys.argv[1:]):
            return
        if launcher_rank() == 0:
            failure.say(failure.short_report(error) or str(error))
        leave(failure.status_of(error))
    except SystemExit as leaving:
        leave(failure.status_of(leaving))


def leave(status: int) -> None:
    if status and launcher_size() > 1:
        failure.flush()
        time.sleep(SKEW_S)
    sys.exit(status)
