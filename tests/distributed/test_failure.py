"""One rank fails: the job is over within ten seconds, with the right status and one report."""

import queue
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch as th

from cm.distributed import failure
from cm.distributed import setup as dist
from cm.errors import UserError
from support import mpi, warm
from support.mpi import Finished, program

LIMIT_S = 10.0

PROGRAM = """
    import os, signal, sys, threading, time
    import torch as th
    from cm.distributed import setup as dist
    from cm.registry import UserError

    folder = sys.argv[0].rpartition("/")[0]

    def failing_now():
        open(folder + "/failed", "w").close()

    def wait_in_gloo():
        dist.all_reduce_sum(th.ones(1))

    def wait_in_mpi():
        from mpi4py import MPI
        MPI.COMM_WORLD.Barrier()

    def wait_in_python():
        time.sleep(600)

    def main():
        dist.setup_dist(timeout_s=TIMEOUT)
        rank = dist.get_rank()
        open(f"{folder}/pid{rank}", "w").write(str(os.getpid()))
        dist.barrier()
        BODY

    dist.run(main)
"""


def job(
    folder: Path, body: str, n: int = 2, timeout_s: float = 600, ranks: ModuleType = warm,
) -> tuple[Finished, float]:
    """Run `body` on `n` ranks; also the seconds from the call of failing_now() to the end of the job.

    :param ranks: `mpi` where it matters who is killed by whom: a forked rank never outlives its stand-in.
    """
    lines = [line for line in body.strip("\n").split("\n")]
    indent = len(lines[0]) - len(lines[0].lstrip())
    body = "\n".join(" " * 8 + line[indent:] for line in lines).lstrip()
    finished = ranks.mpi_program(folder, n, PROGRAM.replace("BODY", body).replace("TIMEOUT", str(timeout_s)))
    mark = folder / "failed"
    return finished, time.time() - mark.stat().st_mtime if mark.exists() else 0.0


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"                             # dead, but the machine's first process has not yet taken note


def left_over(folder: Path) -> list[int]:
    """Ranks that run on after mpiexec has returned; a killed process needs a moment to give its memory back."""
    pids = [int(path.read_text()) for path in folder.glob("pid*")]
    assert pids, "the ranks never started"
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


@pytest.mark.mpi
@pytest.mark.parametrize("waiting, ranks", [("wait_in_gloo", mpi), ("wait_in_mpi", mpi), ("wait_in_python", warm)],
                         ids=["gloo", "MPI", "Python"])
def test_an_exception_on_one_rank_ends_the_job(tmp_path, waiting, ranks):
    finished, seconds = job(tmp_path, f"""
        if rank == 1:
            failing_now()
            raise RuntimeError("the sky fell")
        {waiting}()
    """, ranks=ranks)
    assert finished.rc == 1, finished
    assert seconds < LIMIT_S, finished
    assert "rank 1 of 2 failed" in finished.stderr and "RuntimeError: the sky fell" in finished.stderr, finished
    assert finished.stderr.count("Traceback (most recent call last)") == 1, finished
    assert left_over(tmp_path) == []


@pytest.mark.mpi
def test_an_exception_on_all_ranks_is_shown_once(tmp_path):
    finished, seconds = job(tmp_path, """
        failing_now()
        raise RuntimeError("the sky fell")
    """, n=3)
    assert finished.rc == 1 and seconds < LIMIT_S, finished
    assert finished.stderr.count("Traceback (most recent call last)") == 1, finished


@pytest.mark.mpi
@pytest.mark.parametrize(
    "leave, rc, said",
    [("sys.exit(3)", 3, ""), ("sys.exit('enough')", 1, "enough"), ("raise KeyboardInterrupt", 130, "interrupted")],
)
def test_one_rank_that_leaves_takes_the_others_along(tmp_path, leave, rc, said):
    finished, seconds = job(tmp_path, f"""
        if rank == 1:
            failing_now()
            {leave}
        wait_in_gloo()
    """)
    assert finished.rc == rc and seconds < LIMIT_S, finished
    assert said in finished.stderr and "Traceback" not in finished.stderr, finished


@pytest.mark.mpi
def test_a_mistake_of_the_users_is_one_line(tmp_path):
    finished, seconds = job(tmp_path, """
        failing_now()
        raise UserError("--lr -1 is negative")
    """)
    assert finished.rc == 2 and seconds < LIMIT_S, finished
    assert finished.stderr.strip() == "error: --lr -1 is negative", finished


@pytest.mark.mpi
@pytest.mark.parametrize("body, status", [('raise UserError("no")', 2), ("pass", 0)], ids=["a mistake", "all is done"])
def test_no_rank_is_killed_while_it_ends(tmp_path, body, status):
    """mpiexec used to take the first rank that was gone for a crash, and its status was often that of a killed rank.

    Forked ranks, because they are gone at once when they are killed.
    """
    finished = warm.mpi_program(tmp_path, 4, PROGRAM.replace("BODY", body).replace("TIMEOUT", "600"))
    assert finished.rc == status and not finished.stdout, finished
    assert finished.stderr == ("error: no\n" if status else ""), finished


@pytest.mark.mpi
def test_a_missing_file_is_one_line_on_all_ranks(tmp_path):
    finished, _ = job(tmp_path, 'dist.load_state_dict("/nowhere/model.pt")')
    assert finished.rc == 2, finished
    assert len(finished.stderr.strip().split("\n")) == 1 and "'/nowhere/model.pt'" in finished.stderr, finished


@pytest.mark.mpi
def test_a_mistake_seen_by_one_rank_only_still_ends_the_job(tmp_path):
    finished, seconds = job(tmp_path, """
        if rank == 1:
            failing_now()
            raise UserError("cat.png is broken")
        wait_in_mpi()
    """)
    assert finished.rc == 2 and seconds < LIMIT_S, finished
    assert finished.stderr.count("rank 1 of 2: error: cat.png is broken") == 1, finished


@pytest.mark.mpi
def test_a_killed_rank_leaves_no_orphans(tmp_path):
    finished, seconds = job(tmp_path, """
        if rank == 1:
            failing_now()
            os.kill(os.getpid(), signal.SIGKILL)
        wait_in_mpi()
    """, ranks=mpi)
    assert finished.rc != 0 and seconds < LIMIT_S, finished
    assert left_over(tmp_path) == []


@pytest.mark.mpi
def test_a_failed_thread_ends_the_job_and_is_named(tmp_path):
    finished, seconds = job(tmp_path, """
        def write():
            raise OSError("disk on fire")
        if rank == 1:
            failing_now()
            threading.Thread(target=write, name="checkpoint").start()
        wait_in_gloo()
    """)
    assert finished.rc == 1 and seconds < LIMIT_S, finished
    assert "rank 1 of 2, thread checkpoint failed" in finished.stderr, finished
    assert "OSError: disk on fire" in finished.stderr, finished


@pytest.mark.mpi
def test_a_rank_that_stalls_is_named(tmp_path):
    finished, seconds = job(tmp_path, """
        if rank == 1:
            failing_now()
            wait_in_python()
        wait_in_gloo()
    """, n=3, timeout_s=3)
    assert finished.rc == 1 and seconds < 3 + LIMIT_S, finished
    assert "no word from rank 1" in finished.stderr, finished


@pytest.mark.mpi
def test_a_rank_lost_before_mpi_starts_does_not_leave_the_others_waiting(tmp_path):
    finished = warm.mpi_program(tmp_path, 2, """
        import os, sys, time
        if os.environ["PMI_RANK"] == "1":
            sys.modules["mpi4py"] = None            # import mpi4py raises ImportError
        from cm.distributed import setup as dist
        dist.run(dist.setup_dist)
    """, timeout=30)
    assert finished.rc == 2 and "rank 1 of 2" in finished.stderr and "pip install mpi4py" in finished.stderr, finished


def fail_with(error):
    raise error


@pytest.mark.parametrize(
    "error, status, shown",
    [
        (UserError("--lr -1 is negative"), 2, "error: --lr -1 is negative\n"),
        (FileNotFoundError(2, "Not here", "/x"), 2, "error: [Errno 2] Not here: '/x' (test_failure.py:"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(3), 3, ""),
        (SystemExit("enough"), 1, "enough\n"),
    ],
)
def test_a_single_process_ends_with_the_same_statuses(monkeypatch, capsys, error, status, shown):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with pytest.raises(SystemExit) as ending:
        dist.run(lambda: fail_with(error))
    assert ending.value.code == status
    said = capsys.readouterr().err
    assert said.startswith(shown) and said.count("\n") == (shown != "")


def test_a_single_process_goes_on_after_run(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    dist.run(lambda: None)
    dist.run(lambda: sys.exit(0))
    with pytest.raises(ZeroDivisionError):
        dist.run(lambda: 1 / 0)


def test_a_failed_thread_ends_a_single_process(tmp_path):
    finished = warm.python([program(tmp_path, """
        import threading, time
        from cm.distributed import setup as dist

        def main():
            threading.Thread(target=lambda: 1 / 0, name="loader").start()
            time.sleep(60)

        dist.run(main)
    """)], timeout=30)
    assert finished.rc == 1 and "thread loader failed" in finished.stderr, finished
    assert "ZeroDivisionError" in finished.stderr, finished


@pytest.mark.parametrize("text, short", [
    ("[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is", True),
    ("[../gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:1", True),
    ("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1ms for recv operation", False),
    ("Connection reset by peer", False),
])
def test_a_rank_that_was_killed_is_one_line_on_the_others(text, short):
    """Not the traceback of the collective that waited for it, which is not where the mistake is."""
    report = failure.short_report(RuntimeError(text))
    assert (report is not None) == short and failure.status_of(RuntimeError(text)) == 1
    assert not short or "another rank is gone: it was killed or has crashed" in str(report)


@pytest.fixture
def watched(monkeypatch):
    """Rank 1 of 2 in a job whose ranks watch each other: its store, and the status that it has ended with."""
    ended, store = queue.Queue(), th.distributed.HashStore()
    monkeypatch.setattr(failure, "_ending", threading.Event())
    monkeypatch.setattr(failure, "WATCH_S", 0.01)
    monkeypatch.setattr(failure, "SILENCE_S", 0.05)
    monkeypatch.setattr(failure.os, "_exit", ended.put)
    monkeypatch.setattr(failure.atexit, "register", lambda function: function is failure.end_by_itself or pytest.fail())
    return failure.Ranks(1, 2, store, ended.put, lambda: None), ended


def test_a_rank_that_hangs_ends_with_another_that_has_failed(watched, capsys):
    """As one does that waits in NCCL, which never hears of it."""
    ranks, ended = watched
    failure.watch_peers(ranks)
    time.sleep(0.1)
    assert ended.empty()
    assert failure._is_first(ranks._replace(rank=0))        # what a rank records when it fails
    assert ended.get(timeout=10) == 1
    assert "rank 1 of 2 ends: another rank has failed" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["it ends by itself", "the store is lost"])
def test_a_rank_that_ends_by_itself_or_has_lost_the_store_goes_on(watched, case, monkeypatch):
    ranks, ended = watched
    if case == "it ends by itself":
        assert failure._is_first(ranks)
        failure.end_by_itself()
    else:
        def lost(keys):
            raise th.distributed.DistNetworkError("broken pipe")

        ranks = ranks._replace(store=SimpleNamespace(check=lost))
    failure._watch_peers(ranks)
    assert ended.empty()


def test_statuses():
    statuses = {SystemExit(3): 3, SystemExit(): 0, SystemExit("text"): 1, KeyboardInterrupt(): 130, UserError("x"): 2,
                FileNotFoundError(): 2, ValueError(): 1, failure.Overdue(): 75}
    assert {error: failure.status_of(error) for error in statuses} == statuses


def test_memory_errors_come_with_advice():
    assert "--microbatch" in failure.long_report(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "/dev/shm" in failure.long_report(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."))


def test_waiting_for_an_answer_has_a_limit():
    begun = time.monotonic()
    assert failure.within(0.2, lambda: time.sleep(30), default="nobody") == "nobody"
    assert time.monotonic() - begun < 5
    assert failure.within(5, lambda: 1 / 0, default="gone") == "gone"
    assert failure.within(5, lambda: "here", default="gone") == "here"
