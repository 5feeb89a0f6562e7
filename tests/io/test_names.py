"""Tables of names beside lists of the same names."""

import pickle

import numpy as np
import pytest

from cm.io import names
from cm.io.names import CODEC, NameTable

NAMES = ["a/b.png", "", "é.png", "bird", "b" * 300, "ab", "\udcff.png", "bird"]


def table():
    return NameTable.of(name.encode(*CODEC) for name in NAMES)


@pytest.fixture(autouse=True, params=[3, 2**16])
def few_rows_at_once(request, monkeypatch):
    monkeypatch.setattr(names, "ROWS_AT_ONCE", request.param)


def test_a_table_is_a_list_of_its_names():
    made = table()
    assert list(made) == NAMES and len(made) == 8
    assert [made[i] for i in range(-8, 8)] == NAMES * 2 and made[1:5:2] == NAMES[1:5:2]
    assert made.index("bird") == 3
    with pytest.raises(IndexError):
        made[8]
    joined = NameTable.joined([made, NameTable.of([]), made])
    assert list(joined) == NAMES * 2 and list(NameTable.joined([])) == list(NameTable.of([])) == []


@pytest.mark.parametrize("rows", [[], [7, 0, 0, 4, 2], [2, 3, 4, 5], range(8), [0]])
def test_rows_of_a_table(rows):
    rows = np.array(rows, np.int64)
    assert list(table().take(rows)) == [NAMES[i] for i in rows]
    words = [name.encode(*CODEC) for name in NAMES]
    assert table().padded(rows, 300).tolist() == [words[i] for i in rows]


def test_names_are_found():
    made = table()
    assert made.rows_named(b"bird").tolist() == [3, 7] and made.rows_named(b"bord").tolist() == []
    starts = np.cumsum([0, *(len(name.encode(*CODEC)) for name in NAMES)])[:-1]
    assert made.starts.tolist() == starts.tolist()
    assert made.rows_at(np.array([0, 6, 7, 15, 16])).tolist() == [0, 0, 2, 3, 3], "an empty name has no place"


def test_a_table_is_sent_as_two_arrays():
    buffers = []
    frame = pickle.dumps(table(), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 2 and len(frame) < 500
    assert list(pickle.loads(frame, buffers=buffers)) == NAMES
