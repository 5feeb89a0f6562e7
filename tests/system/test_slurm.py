"""Ranks by srun. Needs a real SLURM that this user may start jobs on: make test-slow."""

import shutil
import subprocess
import sys

import pytest

from support.hello import HELLO, hellos
from support.mpi import program, start

pytestmark = [pytest.mark.mpi, pytest.mark.slow]


def why_not() -> str:
    """Why there is no SLURM to try; empty if there is."""
    if not shutil.which("srun"):
        return "there is no srun here: SLURM is not installed"
    tried = subprocess.run(["srun", "-n", "2", "true"], capture_output=True, text=True, timeout=120)
    return "" if tried.returncode == 0 else f"srun starts no job of 2 tasks here: {tried.stderr.strip()}"


@pytest.fixture(scope="module", autouse=True)
def slurm():
    if reason := why_not():
        pytest.skip(reason=f"no SLURM to try: {reason}")


def srun(tmp_path, *options):
    return start(["srun", *options, "-n", "2", sys.executable, program(tmp_path, HELLO)], timeout=120)


def test_ranks_by_pmi2_find_each_other(tmp_path):
    assert [row[:2] + row[3:] for row in hellos(srun(tmp_path, "--mpi=pmi2"))] == [["0", "2", "2"], ["1", "2", "2"]]


def test_ranks_without_pmi_are_refused_with_the_remedy(tmp_path):
    done = srun(tmp_path, "--mpi=none")
    assert done.rc == 2 and "start with `srun --mpi=pmi2`" in done.stderr and "Traceback" not in done.stderr, done


def test_torchrun_inside_a_task(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(["srun", "-n", "1", *command, program(tmp_path, HELLO)], timeout=120)
    assert hellos(done) == [["0", "2", "0", "2"], ["1", "2", "1", "2"]]
