"""Blocks that a process has freed stay with it: the second step takes no new pages from the system."""

import ctypes

import pytest

from cm.distributed import malloc
from support.mpi import mpiexec

COUNT_FAULTS = """
import resource
import torch as th
from cm.distributed import setup as dist
dist.setup_dist()
def step():
    activations = [th.ones(4 * 2**20) for _ in range(6)]                # 16 MiB each
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc"
)


@needs_glibc
@pytest.mark.mpi
def test_steps_take_the_memory_of_those_before_them():
    """Without the settings they fault in all their pages, unless something happens to lie above them on the heap."""
    done = mpiexec(2, ["-c", COUNT_FAULTS])
    assert done.rc == 0 and len(done.stdout.split()) == 2, done
    pages = 10 * 6 * 2**24 // 4096
    assert all(int(word) < pages / 10 for word in done.stdout.split()), done


def test_both_thresholds_are_set(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def mallopt(name, value):
            asked.append((name, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert malloc.keep_freed_blocks({})
    assert asked == [(-1, 2**31 - 1), (-3, 32 * 2**20)]


@pytest.mark.parametrize("name", malloc.BY_THE_USER)
def test_what_the_user_has_set_stays(name):
    assert not malloc.keep_freed_blocks({name: "1"})


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not malloc.keep_freed_blocks({})
