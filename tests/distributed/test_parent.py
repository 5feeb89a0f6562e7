"""Children of a chain of commands whose process is killed."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from cm.distributed.parent import stop_with_parent
from support.mpi import clean_environment, find_mpiexec

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's prctl")
# os.write, as a print in a handler may not interrupt another print.
CHILD = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), sys.exit(0)))
os.write(1, b'ready\\n')
time.sleep(60)
"""


@needs_linux
@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.mpi)])
def test_a_command_stops_and_saves_when_its_chain_is_killed(ranks):
    words = [*([find_mpiexec(), "-n", str(ranks)] if ranks else []), sys.executable, "-S", "-c", CHILD]
    chain = textwrap.dedent(f"""
        from cm.quickstart.stages import execute
        execute({words!r})
    """)
    process = subprocess.Popen([sys.executable, "-c", chain], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, env=clean_environment())
    assert [process.stdout.readline() for _ in range(ranks or 1)] == ["ready\n"] * (ranks or 1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.communicate(timeout=20)[0] == "saved\n" * (ranks or 1), "all have ended, or stdout would be open"


@needs_linux
def test_a_parent_that_died_at_once_counts_too(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)              # as if another process had started it
        act = stop_with_parent()
    assert subprocess.run(["sleep", "60"], preexec_fn=act, timeout=20).returncode == -signal.SIGTERM


def test_other_systems_go_without(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert stop_with_parent() is None
