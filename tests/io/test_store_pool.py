"""A host that never answers is given up; one that has answered is not."""

import os

import pytest
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

from cm.errors import UserError
from cm.io import store_pool

URL = "https://store.example/bucket/file"


class Network:
    """Stands for urllib3's pool: each attempt takes `seconds` of a clock that only it moves."""

    def __init__(self, seconds):
        self.now, self.seconds, self.is_up, self.attempts = 100.0, seconds, False, 0

    def request(self, method, url, **options):
        self.attempts += 1
        self.now += self.seconds
        if not self.is_up:
            raise NewConnectionError(None, "no route to host")
        return method, url, options


@pytest.fixture
def open_pool(monkeypatch):
    """A function from the seconds that an attempt takes to a pool on such a network, and the network."""
    def make(seconds):
        network = Network(seconds)
        monkeypatch.setattr(store_pool.time, "monotonic", lambda: network.now)
        monkeypatch.setattr(store_pool.urllib3, "PoolManager", lambda: network)
        return store_pool.StorePool(), network

    return make


def attempt_until_given_up(pool, url=URL):
    """The error of a caller who repeats what fails, as blobfile does."""
    for _ in range(100):
        try:
            pool.request("GET", url)
        except NewConnectionError:
            continue
        except UserError as error:
            return str(error)
    raise AssertionError("never given up")


@pytest.mark.parametrize("seconds, attempts", [(0.0, store_pool.ATTEMPTS), (3.0, 3), (store_pool.PATIENCE_S, 1)])
def test_a_host_that_never_answers_is_given_up_by_attempts_or_by_time(open_pool, seconds, attempts):
    pool, network = open_pool(seconds)
    said = attempt_until_given_up(pool)
    assert network.attempts == attempts
    assert said.startswith(f"store.example cannot be reached (NewConnectionError, {attempts} attempts in ")
    assert attempt_until_given_up(pool) == said, "who asks again gets the same patience again"


def test_a_host_that_has_answered_once_may_be_away_for_as_long_as_the_caller_likes(open_pool):
    pool, network = open_pool(60.0)
    network.is_up = True
    assert pool.request("GET", URL, fields=1) == ("GET", URL, {"fields": 1})
    network.is_up = False
    for _ in range(50):
        with pytest.raises(NewConnectionError):
            pool.request("GET", URL)
    assert "other.example cannot be reached" in attempt_until_given_up(pool, "https://other.example/file")


def test_a_host_that_is_slow_to_read_from_is_not_one_that_cannot_be_reached(open_pool):
    pool, network = open_pool(60.0)

    def slow(method, url, **options):
        raise ReadTimeoutError(None, url, "slow")

    network.request = slow
    for _ in range(50):
        with pytest.raises(ReadTimeoutError):
            pool.request("GET", URL)


def test_a_process_has_connections_of_its_own(monkeypatch):
    pool, made = store_pool.StorePool(), []

    def connections():
        made.append(object())
        return made[-1]

    monkeypatch.setattr(store_pool.urllib3, "PoolManager", connections)
    assert pool._own_pool() is pool._own_pool() is made[0]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert pool._own_pool() is made[1] and len(made) == 2
