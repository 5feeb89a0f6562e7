"""Programs and ranks that need not import torch, which costs more than all that they do: as `support.mpi` otherwise.

The first test that asks starts two processes that have imported torch, for all tests of a run of pytest. Programs are
forked from them (`support.warm_process`), even ranks from one and odd ranks from the other, so that the order of a set
differs between ranks as it does in a job. mpiexec, MPI and the toolkit's own imports are real.

Not for tests of what happens while Python and torch start: the cost and order of imports, options of the interpreter,
variables that libraries read when they are loaded, the moment at which a signal arrives, the ids of processes.
"""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch as th

from support import mpi
from support.mpi import Finished, clean_environment, program

STAND_IN = Path(__file__).with_name("warm_process.py")
READ_AT_THE_START = ("PYTHON", "LD_", "LC_", "LANG", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "TORCH_",
                     "CUDA_")


@cache
def python_words() -> list[str]:
    """What to write for `python` before a script or -m; afterwards the processes are there."""
    if sys.platform != "linux" or th.cuda.is_available():   # CUDA does not survive a fork
        return [sys.executable]
    controller = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    name = f"warm process of the tests of {controller}, "
    for each in "even", "odd":
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            try:
                listener.bind(f"\0{name}{each}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:         # another worker has started it
                    raise
                continue
            listener.listen(64)
            subprocess.Popen([sys.executable, STAND_IN, "--serve", str(controller)], stdin=listener,
                             stdout=subprocess.DEVNULL, env=clean_environment(), start_new_session=True,
                             preexec_fn=hear_a_hangup)
    return [sys.executable, "-I", "-S", str(STAND_IN), name]


def hear_a_hangup() -> None:
    """In a new process: also where the tests themselves were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def checked(env: Mapping[str, str | None] | None) -> Mapping[str, str | None] | None:
    """The same variables, none of which would be read before they are set."""
    late = [name for name in env or {} if name.startswith(READ_AT_THE_START)]
    assert not late, f"{late} would be set too late: take this function of support.mpi"
    return env


def python(
    args: Sequence[object], timeout: float = 60, env: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
) -> Finished:
    """Run a program as a single process."""
    return mpi.start([*python_words(), *args], timeout, checked(env), cwd)


def mpiexec(
    n: int, args: Sequence[object], timeout: float = 60, env: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
) -> Finished:
    """Run a program on `n` ranks."""
    return mpi.start([mpi.find_mpiexec(), "-n", str(n), *python_words(), *args], timeout, checked(env), cwd)


def mpi_program(
    folder: Path, n: int, source: str, timeout: float = 60, env: Mapping[str, str | None] | None = None,
) -> Finished:
    """Run a program text on `n` ranks."""
    return mpiexec(n, [program(folder, source)], timeout, env)
