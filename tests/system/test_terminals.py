"""Whoever watches a run may leave: its terminal, its pipe, its stderr. The run goes on, and saves."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import warm
from support.commands import NETWORK, TRAIN, curve
from support.mpi import ROOT, clean_environment, find_mpiexec, kill_tree

STEPS = 6


def command(log_dir, steps=STEPS, python=(sys.executable,)):
    words = [*python, ROOT / "scripts/edm_train.py", *NETWORK, *TRAIN, "--global_batch_size", 8,
             "--total_training_steps", steps, "--log_dir", log_dir]
    return shlex.join(map(str, words))


def forked(*args, **more):
    """The command for a process that has imported torch before: nothing is tested of how it starts."""
    return command(*args, python=warm.python_words(), **more)


def shell(text, **env):
    return subprocess.run(["bash", "-c", text], env=clean_environment(env), cwd=ROOT, capture_output=True, timeout=120)


def assert_complete(log_dir, steps=STEPS):
    assert (log_dir / f"model{steps:06d}.pt").exists(), sorted(os.listdir(log_dir))
    assert len(curve(log_dir)) == steps
    assert (log_dir / "log.txt").read_text().count("| step ") == steps


@pytest.mark.parametrize("start, streams", [
    (forked, "2>&1 | head -2"), (forked, "2>&-"), (forked, ">&- 2>&-"), (command, "<&- >&- 2>&-"),
    (forked, ">/dev/full 2>/dev/full"),
], ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_stream_that_is_gone_ends_no_run(tmp_path, start, streams):
    done = shell(f"set -o pipefail; {start(tmp_path / 'run')} {streams}")
    assert done.returncode == 0, done
    assert_complete(tmp_path / "run")


@pytest.mark.mpi
def test_nor_those_of_ranks(tmp_path):
    """Of the ranks themselves: mpiexec ends, and kills all ranks, where its own are gone."""
    words = shlex.split(command(tmp_path / "run"))
    done = shell(f"{find_mpiexec()} -n 2 bash -c {shlex.quote('exec ' + shlex.join(words) + ' >&- 2>&-')}")
    assert done.returncode == 0, done
    assert_complete(tmp_path / "run")


def background(text):
    return subprocess.Popen(["bash", "-c", f"exec {text}"], env=clean_environment(), cwd=ROOT, start_new_session=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def await_rows(log_dir, count):
    path, deadline = log_dir / "progress.csv", time.monotonic() + 60
    while not path.exists() or len(path.read_text().splitlines()) <= count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_closed_terminal_saves_and_stops(tmp_path):
    """SIGHUP, and then a stdout that nobody reads."""
    job = background(forked(tmp_path, steps=4000))
    try:
        await_rows(tmp_path, 3)
        os.kill(job.pid, signal.SIGHUP)
        job.stdout.close()
        assert job.wait(40) == 0
    finally:
        kill_tree(job.pid)
    assert list(tmp_path.glob("model*.pt"))
    assert "SIGHUP: stopped after step" in (tmp_path / "log.txt").read_text()


def test_nohup_stays_in_force(tmp_path):
    job = background(f"nohup {command(tmp_path, steps=30)}")
    try:
        await_rows(tmp_path, 3)
        os.kill(job.pid, signal.SIGHUP)
        assert job.wait(60) == 0
    finally:
        kill_tree(job.pid)
    assert Path(tmp_path, "model000030.pt").exists()


@pytest.mark.parametrize("name", ["f", "f/run"], ids=["a file", "below a file"])
def test_a_log_dir_that_cannot_be_is_one_line(tmp_path, name):
    (tmp_path / "f").touch()
    done = shell(forked(tmp_path / name, 1))
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done
    assert b"choose another --log_dir" in done.stderr, done


def test_a_log_dir_of_any_name_works(tmp_path):
    """Not UTF-8, with controls, and where Python takes every name for ASCII."""
    folder = os.path.join(os.fsencode(tmp_path), b"run_\xe9\x1b[31m\nx")
    done = subprocess.run(
        [*shlex.split(command("x", 1))[:-1], folder], cwd=ROOT, capture_output=True, timeout=100,
        env=clean_environment({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    )
    assert done.returncode == 0, done
    assert os.path.exists(os.path.join(folder, b"model000001.pt"))
    with open(os.path.join(folder, b"log.txt")) as log:
        assert log.readline().startswith("logging to ")
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize("env, words", [
    ({"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "localhost"}, "RANK='' must be a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "x", "MASTER_ADDR": "localhost"}, "WORLD_SIZE='x' must be a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "MASTER_PORT='99999' must"),
])
def test_variables_of_a_launcher_are_checked(tmp_path, env, words):
    done = shell(forked(tmp_path), **env)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and words.encode() in done.stderr, done


@pytest.mark.mpi
@pytest.mark.parametrize("port", ["99999", "no number", ""])
def test_so_is_the_port_under_mpiexec(tmp_path, port):
    done = shell(f"{find_mpiexec()} -n 2 {forked(tmp_path)}", MASTER_PORT=port)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and b"Traceback" not in said, done
    assert said.count(f"MASTER_PORT={port!r} must be a port".encode()) == 1, done


@pytest.mark.parametrize("arguments", [
    ["evaluations/evaluator.py", "{}", "{}", "--no\x1b[2Jflag"], ["scripts/edm_train.py", "--no\x1b[2Jflag"],
    ["evaluations/fid.py", "ref", "--data", "x", "--dest", "x.npz", "--inception", "{}\x1b[2J"],
])
def test_a_message_about_an_odd_name_controls_no_terminal(tmp_path, arguments):
    done = subprocess.run([sys.executable, *(each.format(tmp_path) for each in arguments)], cwd=ROOT, timeout=100,
                          capture_output=True, env=clean_environment())
    assert done.returncode == 2 and b"\\x1b[2J" in done.stderr and b"\x1b" not in done.stderr, done
