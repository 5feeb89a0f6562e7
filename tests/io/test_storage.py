"""Files appear whole or not at all; a store that cannot be reached is given up soon and said once."""

import socket
import time
import types

import pytest
import torch as th
import urllib3
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from cm.checkpoints import serialization
from cm.errors import UserError
from cm.io import storage, store_pool


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in pauses, and in attempts to connect."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    monkeypatch.setattr(store_pool, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def no_network(monkeypatch, clock):
    """A network on which names are not found at once, or packets vanish until the time-out."""
    def fails(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    storage._blobfile.cache_clear()
    yield
    storage._blobfile.cache_clear()


REQUESTS = {
    "exists": storage.exists,
    "is_directory": storage.is_directory,
    "size": storage.size,
    "list_names": storage.list_names,
    "open": storage.open_file,
    "write": lambda path: storage.write_bytes(path, b"x"),
    "files_under": storage.files_under,
}


@pytest.mark.parametrize("vanish", [False, True], ids=["no names", "packets vanish"])
@pytest.mark.parametrize("url", ["az://account/bucket/x.pt", "gs://bucket/x.pt",
                                 "https://account.blob.core.windows.net/bucket/x.pt"])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_an_unreachable_store_is_given_up_within_20_seconds_and_said_once(
    no_network, clock, monkeypatch, capfd, url, vanish, request_name
):
    if vanish:
        def waits(self, *_, timeout, **__):
            clock.now += timeout.connect_timeout
            raise ConnectTimeoutError(self, "timed out")

        monkeypatch.setattr(urllib3.PoolManager, "request", waits)
    with pytest.raises(UserError) as raised:
        REQUESTS[request_name](url)
    assert url in str(raised.value) and "cannot be reached" in str(raised.value) and "network" in str(raised.value)
    assert clock.now <= 20
    assert capfd.readouterr() == ("", "")


def test_a_store_that_has_answered_before_gets_the_time_that_blobfile_gives(monkeypatch, clock):
    answers = [True]

    def request(self, method, url, **options):
        if not answers:
            raise NewConnectionError(types.SimpleNamespace(host="x"), "gone")
        return answers.pop()

    monkeypatch.setattr(urllib3.PoolManager, "request", request)
    pool = store_pool.StorePool()
    assert pool.request("GET", "https://host/x")
    for _ in range(3 * store_pool.ATTEMPTS):
        clock.now += 60
        with pytest.raises(NewConnectionError):
            pool.request("GET", "https://host/x")


def test_an_address_of_an_unknown_kind_is_named():
    with pytest.raises(UserError, match="s3://bucket/x cannot be looked up .*check the address"):
        storage.exists("s3://bucket/x")
    with pytest.raises(UserError, match="cannot write s3://bucket/x"):
        storage.write_bytes("s3://bucket/x", b"")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    serialization.save_tensors(str(path), {"a": th.ones(2)})

    def breaks(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*x.pt.*No space left.*MiB are free"):
        storage.write_atomically(str(path), breaks)
    assert th.load(path, weights_only=True)["a"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
