"""Blocks that a process has freed stay with it: the second step takes no new pages from the system."""

import ctypes

import pytest
from mpi import mpiexec, python

from cm import host_memory

COUNT_FAULTS = """
import resource, sys
import torch as th
from cm import dist_util, host_memory
if sys.argv[1] == "kept":
    dist_util.setup_dist()
def step():
    activations = [th.ones(4 * 2**20) for _ in range(6)]                # 16 MiB each
step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc"
)


@needs_glibc
def test_a_step_takes_the_memory_of_the_one_before_it():
    faults = {way: int(python(["-c", COUNT_FAULTS, way]).stdout) for way in ("kept", "default")}
    assert faults["kept"] < 100 < 1000 < faults["default"], faults


@needs_glibc
@pytest.mark.mpi
def test_every_rank_keeps_its_own():
    done = mpiexec(2, ["-c", COUNT_FAULTS, "kept"])
    assert done.rc == 0 and len(done.stdout.split()) == 2, done
    assert all(int(word) < 100 for word in done.stdout.split()), done


@pytest.mark.parametrize("name", host_memory.BY_THE_USER)
def test_what_the_user_has_set_stays(name):
    assert not host_memory.keep_freed_blocks({name: "1"})


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed_blocks({})
