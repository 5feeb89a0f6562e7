"""Signals: all ranks stop after the same step and save; nothing hangs, and nothing is ever half written."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cm.checkpoints import manifest
from cm.distributed import signals
from support.commands import NETWORK, QUIET, TRAIN, curve, files_of, is_rank
from support.mpi import ROOT, clean_environment, descendants, find_mpiexec, kill_tree, program
from support.warm import mpiexec, python_words

STEPS = 40
COMMAND = [str(ROOT / "scripts/edm_train.py"), *NETWORK, *TRAIN, "--global_batch_size", "16", "--save_interval", "100",
           "--total_training_steps", str(STEPS)]


class Job:
    """A command in the background; it is killed with all its processes at the end of the block."""

    def __init__(self, command, env=None):
        self.process = subprocess.Popen(
            [str(word) for word in command], env=clean_environment(env or QUIET), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        kill_tree(self.process.pid)
        self.process.wait()

    def ranks(self):
        """Their loader processes are copies of them, further down."""
        pythons = [pid for pid in descendants(self.process.pid) if is_rank(pid)]
        loaders = {child for pid in pythons for child in descendants(pid)}
        return [pid for pid in pythons if pid not in loaders]

    def await_true(self, condition, timeout=100):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate(timeout=5)
            time.sleep(0.01)

    def end(self, timeout=30):
        """Exit status and output; no process of the job may be left."""
        processes = descendants(self.process.pid)
        said, _ = self.process.communicate(timeout=timeout)
        deadline = time.monotonic() + 8
        while (left := [pid for pid in processes if Path(f"/proc/{pid}/exe").exists()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, said
        return self.process.returncode, said


def rows(directory):
    path = directory / "progress.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


@pytest.mark.mpi
def test_stops_and_starts_leave_no_trace_in_the_result(tmp_path):
    """SIGTERM and SIGINT to mpiexec, SIGUSR1 to a single rank, each at some step; then the bytes of an undisturbed run.

    With two loader processes on each rank. The second and third time the ranks are forked.
    """
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    workers = ("--num_workers", "2")
    assert mpiexec(2, [*COMMAND, *workers, "--log_dir", straight], timeout=120, env=QUIET).rc == 0
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        begun = rows(stopped)
        python = [sys.executable] if kind == signal.SIGTERM else python_words()
        with Job([find_mpiexec(), "-n", "2", *python, *COMMAND, *workers, "--log_dir", stopped]) as job:
            job.await_true(lambda: rows(stopped) >= begun + 4)  # noqa: B023 (waited for here)
            os.kill(job.ranks()[-1] if kind == signal.SIGUSR1 else job.process.pid, kind)
            rc, said = job.end()
        assert rc == 0, said
        assert f"{kind.name}: stopping after this step" in said or kind == signal.SIGUSR1
        assert '"finished": false' in (stopped / "status.json").read_text()
        last_words = (stopped / "log.txt").read_text().strip().splitlines()[-1]
        step = manifest.newest(str(stopped)).step
        assert begun + 4 <= step < STEPS and rows(stopped) == step
        assert last_words == (f"{kind.name}: stopped after step {step} of {STEPS} and saved; "
                              "the same command resumes from there")
    assert mpiexec(2, [*COMMAND, *workers, "--log_dir", stopped], timeout=120, env=QUIET).rc == 0
    assert files_of(stopped, STEPS) == files_of(straight, STEPS) and len(files_of(straight, STEPS)) == 4
    assert (curve(stopped) == curve(straight)).all()
    assert json.loads((stopped / "status.json").read_text()) == {"finished": True, "step": STEPS, "of": STEPS}


def test_a_loader_process_outlives_the_signal_for_as_long_as_the_page_says():
    """In a process of its own: SIGTERM starts a clock, which ends it with SIGALRM."""
    assert f"to all processes of a job for {signals.LOADER_S} seconds" in (ROOT / "docs/runs.md").read_text()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import os, signal, time
        from cm.distributed import signals
        signals.LOADER_S = 1
        signals.outlive_the_signal()
        os.kill(os.getpid(), signal.SIGTERM)
        print("goes on", flush=True)
        time.sleep(30)
    """)], env=clean_environment(QUIET), capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGALRM and done.stdout == "goes on\n", done


def test_a_signal_during_the_imports_is_not_lost(tmp_path):
    """One process; also that a signal to the whole process group does not take the loader processes first."""
    steps = 10 * STEPS                                      # not done before a busy machine has sent the signal
    command = [sys.executable, *COMMAND[:-1], str(steps), "--num_workers", "2", "--log_dir", tmp_path]
    with Job(command) as job:
        job.await_true(lambda: catches(job.process.pid, signal.SIGTERM), 20)
        assert not (tmp_path / ".lock").exists()            # far from the first step
        os.kill(job.process.pid, signal.SIGTERM)
        rc, said = job.end(60)
    assert rc == 0 and rows(tmp_path) == 1, said
    with Job(command) as job:
        job.await_true(lambda: rows(tmp_path) >= 3)
        os.killpg(job.process.pid, signal.SIGTERM)
        rc, said = job.end()
    assert rc == 0, said
    assert 3 <= manifest.newest(str(tmp_path)).step == rows(tmp_path) < steps


def test_a_signal_as_soon_as_it_is_caught_is_not_lost():
    """It comes between the first handler and whatever is set up after it."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import os, signal, time
        from cm.distributed import signals
        catch = signal.signal

        def catch_and_get(signum, handler):
            catch(signum, handler)
            if signum == signal.SIGTERM:
                os.kill(os.getpid(), signum)

        signal.signal = catch_and_get
        signals.listen()
        deadline = time.monotonic() + 20
        while not signals.requested() and time.monotonic() < deadline:
            time.sleep(0.01)
        print(signals.name_of(signals.requested()))
    """)], env=clean_environment(QUIET), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "SIGTERM\n", done


def test_the_grace_period_is_a_flag(tmp_path):
    with Job([sys.executable, *COMMAND, "--grace_seconds", "0", "--log_dir", tmp_path]) as job:
        job.await_true(lambda: catches(job.process.pid, signal.SIGTERM), 20)
        os.kill(job.process.pid, signal.SIGTERM)
        rc, said = job.end(60)
    assert rc == 75 and "no stop within 0 s of SIGTERM" in said and not rows(tmp_path), said


def catches(pid, signum):
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(mask >> (signum - 1) & 1)


HANG = """
    import sys, time
    from pathlib import Path
    from cm.distributed import signals

    signals.listen()

    import torch as th
    from cm.distributed import setup as dist

    def main():
        dist.setup_dist()
        signals.allow(float(sys.argv[1]))
        dist.barrier()
        if dist.get_rank() == 1:
            Path(sys.argv[2]).touch()
            time.sleep(600)
        dist.all_reduce_sum(th.ones(1))

    dist.run(main)
"""


@pytest.mark.mpi
def test_a_rank_that_hangs_holds_up_the_end_for_the_grace_period_only(tmp_path):
    with Job([find_mpiexec(), "-n", "2", *python_words(), program(tmp_path, HANG), "2", tmp_path / "hangs"]) as job:
        job.await_true((tmp_path / "hangs").exists)
        begun = time.monotonic()
        os.kill(job.process.pid, signal.SIGTERM)
        rc, said = job.end()
    assert rc == 75 and 2 <= time.monotonic() - begun < 2 + 10, said
    assert said.count("error: no stop within 2 s of SIGTERM: some rank hangs") == 1, said


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_ends_the_job_at_once(tmp_path, ranks):
    launcher = [find_mpiexec(), "-n", "2"] if ranks == 2 else []
    source = HANG if ranks == 2 else HANG.replace("get_rank() == 1", "get_rank() == 0")
    with Job([*launcher, *python_words(), program(tmp_path, source), "600", tmp_path / "hangs"]) as job:
        job.await_true((tmp_path / "hangs").exists)
        os.kill(job.process.pid, signal.SIGINT)
        time.sleep(0.5)
        assert job.process.poll() is None
        begun = time.monotonic()
        os.kill(job.process.pid, signal.SIGINT)
        rc, said = job.end()
    assert time.monotonic() - begun < 10, said
    # After the second Ctrl-C mpiexec kills the ranks itself; where its proxy falls over a closed connection on the way,
    # mpiexec ends with 0.
    assert rc != 0 or "proxy" in said and "assert (!closed) failed" in said, said


def test_the_grace_period_begins_anew_after_a_save(monkeypatch):
    """The seconds before the save and those of the save itself are forgotten: a step has the whole period again."""
    now = [1000.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals, "_state", signals._State())
    signals.allow(10)
    signals._record(signal.SIGTERM)
    now[0] += 9
    assert not signals._is_overdue()
    with signals.unhurried():
        now[0] += 500
        assert not signals._is_overdue()
        with signals.unhurried():                           # the measurement of a callback may save, too
            now[0] += 500
        now[0] += 500
        assert not signals._is_overdue()
    now[0] += 9.5
    assert not signals._is_overdue()
    now[0] += 1
    assert signals._is_overdue()
    signals.agreed()
    assert not signals._is_overdue()


def test_a_signal_during_a_save_waits_for_it(tmp_path):
    """A save that takes longer than the grace period is finished, and what it replaces stays until then."""
    source = """
        import sys, time
        from cm.distributed import signals

        signals.listen()

        import torch as th
        from cm.distributed import setup as dist
        from cm.checkpoints import manifest

        class Slow(dict):
            def items(self):
                for item in super().items():
                    print("writing", flush=True)
                    time.sleep(1.0)
                    yield item

        def main():
            signals.allow(1.0)
            content = {name: {"w": th.ones(3)} for name in ("model", "opt", "trainer")}
            manifest.save(sys.argv[1], 1, content, {}, 1)
            with signals.unhurried():
                manifest.save(sys.argv[1], 2, Slow(content), {}, 2)
            print(signals.requested(), flush=True)

        dist.run(main)
    """
    with Job([*python_words(), program(tmp_path, source), tmp_path / "run"]) as job:
        assert job.process.stdout.readline() == "writing\n"
        os.kill(job.process.pid, signal.SIGTERM)
        rc, said = job.end()
    assert rc == 0 and said.endswith(f"{int(signal.SIGTERM)}\n"), said
    assert manifest.newest(str(tmp_path / "run")).step == 2
