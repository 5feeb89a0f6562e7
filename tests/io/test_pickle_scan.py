"""The operations of a pickle are followed without being done, and what they would ask for is counted."""

import io
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from cm.io.budget import Budget
from cm.io.pickle_scan import scan
from support import bombs


class Kept:
    def __init__(self):
        self.inner = [1, 2, {3: (4, 5)}]


HONEST = [None, 3.5, "x", [1, [2, [3]]], {"a": (1, 2, 3), "b": {1, 2}}, frozenset({1}), bytes(300), bytearray(9),
          Kept(), OrderedDict(a=1), np.arange(5), 2**70, list(range(3000))]


@pytest.mark.parametrize("protocol", range(6))
def test_honest_pickles_pass_and_the_file_stands_behind_them(protocol):
    shared = ["a"]
    for value in [*HONEST, [shared, shared, {"k": shared}]]:
        data = pickle.dumps(value, protocol)
        file = io.BytesIO(data + b"rest")
        assert scan(file) == []
        assert file.read() == b"rest"


def test_references_to_data_outside_are_returned():
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", np.ndarray, "0", 12) if isinstance(obj, Kept) else None

    file = io.BytesIO()
    Pickler(file, 2).dump({"a": Kept()})
    assert scan(io.BytesIO(file.getvalue())) == [("storage", "numpy ndarray", "0", 12)]


def deep(levels):
    value = ()
    for _ in range(levels):
        value = (value,)
    return b"\x80\x02" + b")" + b"\x85" * levels + b"."


BAD = {
    "shared tuples": (bombs.nested_key(), "more than 2,000,000 values"),
    "deep tuples": (deep(300), "200 levels"),
    "large memo": (bombs.large_memo(), "memo has a place"),
    "many operations": (b"N0" * 1_100_000 + b"N.", "more than 2,000,000 values"),
    "cut off": (pickle.dumps([1, 2])[:-3], "."),
    "empty stack": (b"\x80\x02a.", "does not exist"),
    "unknown memo": (b"\x80\x02h\x05.", "does not exist"),
    "claimed text": (b"\x80\x04\x8d" + b"\xff" * 6 + b"\0\0.", "."),
    "no pickle": (b"hello", "."),
}


@pytest.mark.parametrize("name", BAD)
def test_pickles_that_ask_for_too_much(name):
    data, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        scan(io.BytesIO(data))


def test_the_bound_is_the_budgets():
    data = pickle.dumps([1] * 50)
    scan(io.BytesIO(data), Budget(10**6, 200))
    with pytest.raises(ValueError, match="40 values"):
        scan(io.BytesIO(data), Budget(10**6, 40))
