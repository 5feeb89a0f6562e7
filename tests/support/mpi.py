"""Start real ranks from a test, with a time limit that leaves no process behind.

Tests that use this carry `@pytest.mark.mpi`.
"""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "HYDI_", "OMPI_", "MPI_", "SLURM_", "MV2_", "TORCHELASTIC_", "GLOO_", "MASTER_")
OWN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENAI_LOGDIR",
                 "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI",
                 "PYTHONUNBUFFERED")           # it splits a print into pieces, which mix with those of other ranks


@dataclass
class Finished:
    """How a program ended."""

    rc: int
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        return f"rc {self.rc} after {self.seconds:.1f} s\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


def find_mpiexec() -> str:
    """The mpiexec beside this Python, which belongs to its mpi4py; otherwise the one on PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert found, "no mpiexec: install the test requirements (pip install mpich), or an MPI with its mpi4py"
    return found


def clean_environment(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's variables without those of a launcher; one thread; project and tests' helpers can be imported.

    A value of None in `extra` removes a variable.
    """
    env = {
        name: value for name, value in os.environ.items()
        if not name.startswith(LAUNCHER_VARIABLES) and name not in OWN_VARIABLES
    }
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [env.get("PYTHONPATH")])])
    env |= {"OMP_NUM_THREADS": "1", **(extra or {})}
    return {name: value for name, value in env.items() if value is not None}


def start(
    command: Sequence[str], timeout: float = 60, env: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
) -> Finished:
    """Run a command to its end; after `timeout` seconds kill it with all its descendants and fail with the output."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", env=clean_environment(env), cwd=cwd or ROOT, start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        stdout, stderr = process.communicate()
        finished = Finished(-signal.SIGKILL, stdout, stderr, time.monotonic() - begun)
        raise AssertionError(f"still running after {timeout} s: {' '.join(map(str, command))}\n{finished}") from None
    return Finished(process.returncode, stdout, stderr, time.monotonic() - begun)


def python(
    args: Sequence[str], timeout: float = 60, env: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
) -> Finished:
    """Run this Python as a single process."""
    return start([sys.executable, *args], timeout, env, cwd)


def mpiexec(
    n: int, args: Sequence[str], timeout: float = 60, env: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
) -> Finished:
    """Run `python args` on `n` ranks."""
    return start([find_mpiexec(), "-n", str(n), sys.executable, *args], timeout, env, cwd)


def program(folder: Path, source: str) -> Path:
    """Write `source`, dedented, to a file of its own in `folder`."""
    path = folder / f"program{len(list(folder.glob('program*.py')))}.py"
    path.write_text(textwrap.dedent(source))
    return path


def mpi_program(
    folder: Path, n: int, source: str, timeout: float = 60, env: Mapping[str, str | None] | None = None,
) -> Finished:
    """Run a program text on `n` ranks."""
    return mpiexec(n, [program(folder, source)], timeout, env)


def descendants(pid: int) -> list[int]:
    """Processes started by `pid`, at any depth. Ranks have sessions of their own, so a process group is not enough."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:                                             # it ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, waiting = [], [pid]
    while waiting:
        offspring = children.get(waiting.pop(), [])
        found += offspring
        waiting += offspring
    return found


def kill_tree(pid: int) -> None:
    for each in [pid, *descendants(pid)]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue
