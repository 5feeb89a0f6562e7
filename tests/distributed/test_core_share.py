"""A run says so where other programs use its cores: by the kernel's numbers, and with two real threads on one core."""

import hashlib
import os
import sys
import threading
import time

import pytest

from cm.distributed import core_share
from cm.distributed.core_share import CoreWatch, ThreadTimes, thread_times
from cm.logging import logger
from support.training import loop

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts it")


def test_times_of_all_threads_are_added(tmp_path):
    for name, text in {"1": "2000000000 500000000 7", "2": "1000000000 0 9", "gone": "", "odd": "a b c"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "ended").mkdir()
    assert thread_times(tmp_path) == ThreadTimes(3.0, 0.5)


def test_a_system_that_counts_nothing_has_no_warning(tmp_path, monkeypatch):
    assert thread_times(tmp_path) is None
    monkeypatch.setattr(core_share, "thread_times", lambda: None)
    assert CoreWatch(2).warning() == ""


@LINUX
def test_two_threads_on_one_core_wait_for_each_other():
    """Each has the core for half of the time, whatever else runs: more programs only lower the share."""
    def work() -> None:
        os.sched_setaffinity(0, {core})                     # of the calling thread alone
        deadline = time.monotonic() + 0.4
        while time.monotonic() < deadline:
            hashlib.sha256(block)                           # without Python's lock

    core, block = min(os.sched_getaffinity(0)), bytes(2**22)
    before = thread_times()
    seen = []
    threads = [threading.Thread(target=work) for _ in range(2)]
    for each in threads:
        each.start()
    time.sleep(0.3)
    seen.append(thread_times())                             # while they exist
    for each in threads:
        each.join()
    ran, waited = (now - then for now, then in zip(seen[0], before))
    assert waited > 0.4 * (ran + waited) > 0.1


@pytest.fixture
def clock(monkeypatch):
    """The kernel's numbers, to be set."""
    times = [ThreadTimes(1.0, 0.0)]
    monkeypatch.setattr(core_share, "thread_times", lambda: times[-1])
    return times


def test_it_warns_once_above_a_third(clock):
    watch = CoreWatch(2)
    clock.append(ThreadTimes(3.0, 2.0))                     # half, but of four seconds
    assert watch.warning() == ""
    clock.append(ThreadTimes(8.0, 3.4))                     # 3.4 of 10.4
    assert watch.warning() == ""
    clock.append(ThreadTimes(11.0, 6.4))                    # 3 of the 6 since then
    assert "2 threads of this run wait 50% of their time" in (said := watch.warning()) and "OMP_NUM_THREADS=1" in said
    clock.append(ThreadTimes(12.0, 96.4))
    assert watch.warning() == ""


def test_a_single_thread_waits_for_no_other(clock):
    watch = CoreWatch(1)
    clock.append(ThreadTimes(2.0, 90.0))
    assert watch.warning() == ""


def test_a_run_says_it_in_its_log(images, tmp_path, monkeypatch, clock):
    monkeypatch.setattr(core_share.th, "get_num_threads", lambda: 2)
    trained = loop(images, tmp_path / "run", 2, log_interval=1)
    logger.configure(dir=str(tmp_path / "run"), format_strs=["log"])
    run_step = trained.run_step

    def on_busy_cores(batch):
        run_step(batch)
        clock.append(ThreadTimes(clock[-1].ran + 1, clock[-1].waited + 9))

    trained.run_step = on_busy_cores
    trained.run_loop()
    assert (tmp_path / "run" / "log.txt").read_text().count("wait 90% of their time for a core") == 1
