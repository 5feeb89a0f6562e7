"""A rank that waits for others says so after a while, and ends at the limit with one clear line and status 1."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from cm.distributed import failure, waiting
from support.mpi import ROOT, program, python

LONELY = """
    import socket

    from cm.distributed import setup as dist
    from cm.distributed import failure, waiting

    waiting.NOTICE_S, failure.SILENCE_S = 0.3, 0.1
    look_up = socket.getaddrinfo

    def without_dns(host, *rest, **more):                      # a resolver without a network may take long to say so
        if host.endswith(".invalid"):
            raise socket.gaierror(-2, "Name or service not known")
        return look_up(host, *rest, **more)

    socket.getaddrinfo = without_dns
    dist.run(lambda: print("met"), 1.0)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.parametrize("rank, host, told", [
    ("0", "127.0.0.1", "for rank 1: 1 of 2 have come to 127.0.0.1:{port}"),
    ("1", "127.0.0.1", "for rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT={port} ([Errno 111] Connection refused)"),
    ("1", "no-such-host.invalid",
     "for rank 0 at MASTER_ADDR=no-such-host.invalid, MASTER_PORT={port} ([Errno -2] Name or service not known)"),
], ids=["rank 1 missing", "rank 0 missing", "no address"])
def test_a_missing_rank_is_told_and_ends_the_job(tmp_path, rank, host, told):
    port = free_port()
    env = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    finished = python([program(tmp_path, LONELY)], env=env)
    lines, told = finished.stderr.splitlines(), told.format(port=port)
    assert finished.rc == 1 and len(lines) == 2 and not finished.stdout, finished
    assert lines[0].startswith(f"rank {rank} of 2 waits {told}"), finished
    assert lines[0].endswith("; it gives up after 1 s"), finished
    assert lines[1].startswith(f"rank {rank} of 2: error: waited 1 s in vain {told}"), finished


def test_the_limit_of_training_is_timeout_seconds(tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    finished = python([ROOT / "scripts/edm_train.py", "--data_dir", tmp_path, "--timeout_seconds", "1"], env=env)
    assert finished.rc == 1 and "error: waited 1 s in vain for rank 1: 1 of 2" in finished.stderr, finished


def test_ranks_meet_and_rank_0_names_who_is_missing(monkeypatch, capfd):
    monkeypatch.setattr(waiting, "NOTICE_S", 0.2)
    store = HashStore()

    def come(rank: int) -> None:
        time.sleep(0.5 * (rank == 2))
        waiting.await_ranks(store, rank, 3, "here:1", waiting.Wait(f"rank {rank} of 3", 20))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(come, range(3)))
    told = "rank 0 of 3 waits for rank 2: 2 of 3 have come to here:1; it gives up after 20 s\n"
    assert capfd.readouterr().err == told


def test_all_ranks_name_the_missing_one_at_the_limit():
    store = HashStore()

    def come(rank: int) -> str:
        with pytest.raises(failure.RanksMissing) as caught:
            waiting.await_ranks(store, rank, 12, "here:1", waiting.Wait("rank", 0.3))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(come, range(2)))
    ranks = "2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert found == [f"waited 0.3 s in vain for ranks {ranks}: 2 of 12 have come to here:1"] * 2


def test_rank_0_may_start_late(monkeypatch):
    port = free_port()

    def listen() -> None:
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.accept()

    thread = threading.Thread(target=listen)
    thread.start()
    waiting.await_address("127.0.0.1", port, waiting.Wait("rank 1 of 2", 20))
    thread.join()


def test_a_lost_rank_0_is_named():
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer\nException raised from here")

    with pytest.raises(failure.RanksMissing, match=r"lost rank 0 at here:1 .*\(Connection reset by peer\)"):
        waiting.await_ranks(Gone(), 1, 2, "here:1", waiting.Wait("rank 1 of 2", 5))


def test_waits_inside_mpi_are_told_and_limited(monkeypatch, capfd):
    monkeypatch.setattr(waiting, "NOTICE_S", 0.1)
    ended = []
    with waiting.mpi_wait("rank 1 of 2", 0.3, ended.append):
        time.sleep(1)
    assert [str(error) for error in ended] == ["waited 0.3 s in vain for the other ranks of its mpiexec or srun"]
    assert capfd.readouterr().err.startswith("rank 1 of 2 waits for the other ranks of its mpiexec")
    with waiting.mpi_wait("rank 1 of 2", 0.3, ended.append):
        pass
    time.sleep(0.5)
    assert len(ended) == 1
