"""Programs forked from a process that has imported torch are like new ones in all that the tests look at."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import mpi, warm
from support.mpi import clean_environment, program

pytestmark = pytest.mark.skipif(len(warm.python_words()) == 1, reason="programs are not forked on this machine")

FACTS = """
    import atexit, json, os, signal, sys, threading
    import torch as th

    class Here:
        pass

    atexit.register(lambda: print("at the end"))
    print(json.dumps({
        "argv": sys.argv, "path": sys.path, "name": __name__, "file": __file__, "class": Here.__module__,
        "main": sys.modules["__main__"].Here is Here, "folder": os.getcwd(), "variables": dict(os.environ),
        "stdin": sys.stdin.read(), "terminals": [each.isatty() for each in (sys.stdin, sys.stdout, sys.stderr)],
        "encodings": [sys.stdout.encoding, sys.stdout.errors, sys.stderr.encoding, sys.stderr.errors],
        "streams": len(os.listdir("/proc/self/fd")), "threads": [threading.active_count(), th.get_num_threads()],
        "signals": [str(signal.getsignal(each)) for each in range(1, 32)], "cm": "cm" in sys.modules,
        "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }))
    print("said", file=sys.stderr)
    sys.exit(int(sys.argv[2]))
"""


def test_a_program_finds_what_a_new_process_has(tmp_path):
    args = [program(tmp_path, FACTS), "an argument with ' and \"", "7"]
    new, forked = (start(args, env={"TOLD": "\u00e9 \n"}, cwd=tmp_path) for start in (mpi.python, warm.python))
    assert new.rc == forked.rc == 7
    assert new.stderr == forked.stderr == "said\n"
    assert new.stdout.endswith("at the end\n") and forked.stdout.endswith("at the end\n")
    expected, found = (json.loads(each.stdout.splitlines()[0]) for each in (new, forked))
    assert found == expected and expected["variables"]["TOLD"] == "\u00e9 \n"


def test_a_module_an_error_and_a_signal_end_as_in_a_new_process(tmp_path):
    (tmp_path / "module.py").write_text("import sys\nprint(__name__, sys.argv[1:], sys.path[0] in ('', sys.argv[1]))")
    assert warm.python(["-m", "module", tmp_path], cwd=tmp_path).stdout == f"__main__ ['{tmp_path}'] True\n"
    failed = warm.python([program(tmp_path, "raise RuntimeError('why')")])
    assert failed.rc == 1 and failed.stderr.endswith("RuntimeError: why\n"), failed
    killed = warm.python([program(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGABRT)")])
    assert killed.rc == -signal.SIGABRT, killed


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&-"])
def test_streams_that_are_closed_are_none(tmp_path, closed):
    found = program(tmp_path, "import sys; streams = sys.stdin, sys.stdout, sys.stderr, sys.__stderr__\n"
                    "open(sys.argv[1], 'w').write(str([each is None for each in streams]))")
    said = []
    for words in [sys.executable], warm.python_words():
        done = subprocess.run(["bash", "-c", f"{shlex.join(map(str, [*words, found, tmp_path / 'said']))} {closed}"],
                              env=clean_environment(), timeout=60)
        said.append((done.returncode, (tmp_path / "said").read_text()))
    assert said[0] == said[1] and "True" in said[0][1]


def test_what_a_program_leaves_to_its_end_is_done(tmp_path):
    """Though the modules that it did not import itself are not taken apart."""
    source = """
        import atexit, ctypes, sys, threading, time, weakref
        import torch
        tensor = torch.ones(1)
        weakref.finalize(tensor, print, "tensor")
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
        atexit.register(lambda: print("at the end", torch.ones(2).sum().item(), "torch" in sys.modules))
        ctypes.CDLL(None).printf(b"of C\\n")
        sys.exit("why")
    """
    new, forked = (start([program(tmp_path, source)]) for start in (mpi.python, warm.python))
    for done in new, forked:
        assert (done.rc, done.stderr) == (1, "why\n"), done
        assert sorted(done.stdout.splitlines()) == ["at the end 2.0 True", "of C", "tensor", "thread"], done


def test_two_programs_draw_different_numbers(tmp_path):
    """Unless they set a seed: a test that two runs agree must not be true for this reason."""
    drawing = program(tmp_path, "import random, numpy, torch\n"
                      "print(random.random(), numpy.random.rand(), torch.rand(()).item())")
    numbers = [number for _ in range(2) for number in warm.python([drawing]).stdout.split()]
    assert len(set(numbers)) == 6


@pytest.mark.mpi
def test_the_order_of_a_set_differs_between_ranks(tmp_path):
    source = "import os; os.write(1, f'{os.environ[\"PMI_RANK\"]} {hash(\"a word\")}\\n'.encode())"
    hashes = dict(line.split() for line in warm.mpi_program(tmp_path, 3, source).stdout.splitlines())
    assert hashes["0"] == hashes["2"] != hashes["1"]


def test_signals_reach_the_program_and_it_is_gone_with_its_stand_in(tmp_path):
    source = """
        import os, signal, time
        signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"heard\\n"))
        print(os.getpid(), flush=True)
        time.sleep(100)
    """
    with subprocess.Popen([*warm.python_words(), program(tmp_path, source)], stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, env=clean_environment()) as job:
        pid = int(job.stdout.readline())
        job.send_signal(signal.SIGUSR1)
        assert job.stdout.readline() == "heard\n"
        job.kill()
        deadline = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not os.path.exists(f"/proc/{pid}")


def test_the_process_ends_with_the_test_run(tmp_path):
    source = """
        import subprocess, sys
        from support import warm
        name = warm.python_words()[-1]
        print(name + ";" + warm.python([sys.argv[1]]).stdout)
    """
    hello = tmp_path / "hello.py"
    hello.write_text("print('hello')")
    done = mpi.python([program(tmp_path, source), hello], env={"PYTEST_XDIST_WORKER": None})
    name, said = done.stdout.split("\n")[0].split(";")
    assert said == "hello", done
    deadline = time.monotonic() + 20
    while name in (there := Path("/proc/net/unix").read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert name not in there


def test_variables_that_would_be_read_too_late_are_refused():
    with pytest.raises(AssertionError, match=r"\['OMP_NUM_THREADS'\] would be set too late"):
        warm.python(["-m", "x"], env={"OMP_NUM_THREADS": "2"})
