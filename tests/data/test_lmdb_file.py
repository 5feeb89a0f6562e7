"""LSUN's databases read without the library: the same entries as with it, and no crash whatever is damaged."""

import struct

import lmdb
import numpy as np
import pytest

from cm.data import lmdb_file
from cm.data.lmdb_file import LmdbFile
from cm.errors import UserError


def written(folder, content):
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in content.items():
            transaction.put(key, value)
    return folder


def read(folder):
    file = LmdbFile(folder)
    return {entry.key: file.value(entry) for entry in file.entries()}


@pytest.mark.parametrize("count", [1, 30, 3000])
def test_the_entries_are_those_of_the_library(tmp_path, count):
    """On one page and on trees of pages, with values inside of a page and on pages of their own."""
    rng = np.random.default_rng(count)
    content = {rng.bytes(int(rng.integers(1, 60))): rng.bytes(int(rng.choice([0, 1, 50, 900, 2100, 9000])))
               for _ in range(count)}
    folder = written(tmp_path / "x_lmdb", content)
    assert list(read(folder).items()) == sorted(content.items())
    assert len(LmdbFile(folder)) == len(content)
    again = {b"zz": b"later", **content}
    written(folder, {b"zz": b"later"})                              # the other of the two heads
    assert read(folder) == again


def test_a_file_that_is_cut_off_is_an_error(tmp_path):
    """The library maps it, and the process dies of a bus error."""
    folder = written(tmp_path / "x_lmdb", {bytes([i]): bytes(3000) for i in range(50)})
    path = folder / "data.mdb"
    whole = path.read_bytes()
    for size in (len(whole) - 5000, len(whole) // 2, 8192, 5000, 100, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="data.mdb cannot be read as an lmdb database.*download complete"):
            read(folder)


def test_pages_that_lead_in_a_circle(tmp_path):
    folder = written(tmp_path / "x_lmdb", {struct.pack(">I", i): bytes(300) for i in range(200)})
    path, root = folder / "data.mdb", LmdbFile(folder).table.root
    data = bytearray(path.read_bytes())
    page = data[root * 4096 : root * 4096 + 4096]
    first = struct.unpack_from("<H", page, 16)[0]
    struct.pack_into("<HHH", data, root * 4096 + first, root & 0xFFFF, root >> 16, 0)
    path.write_bytes(data)
    with pytest.raises(UserError, match="lead back to themselves"):
        read(folder)


def test_what_no_lsun_database_has_is_refused(tmp_path):
    with lmdb.open(str(tmp_path / "two"), map_size=2**22) as environment:
        environment.close()
    with pytest.raises(UserError, match="is empty"):
        LmdbFile(tmp_path / "two")
    with lmdb.open(str(tmp_path / "inner"), map_size=2**22, max_dbs=2) as environment:
        inner = environment.open_db(b"inner", dupsort=True)
        with environment.begin(write=True) as transaction:
            transaction.put(b"a", b"b", db=inner)
    with pytest.raises(UserError, match="tables within tables"):
        read(tmp_path / "inner")


def test_a_value_beyond_the_budget_is_not_read(tmp_path, monkeypatch):
    folder = written(tmp_path / "x_lmdb", {b"a": bytes(5000)})
    monkeypatch.setattr(lmdb_file, "PICTURE", lmdb_file.PICTURE.__class__(4999))
    with pytest.raises(UserError, match="5,000 bytes at .* are no image"):
        read(folder)


def test_flipped_bytes_are_at_worst_an_error(tmp_path):
    folder = written(tmp_path / "x_lmdb", {struct.pack(">I", i): bytes(700) for i in range(60)})
    path, rng = folder / "data.mdb", np.random.default_rng(0)
    whole = path.read_bytes()
    for _ in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        page = int(rng.integers(len(data) // 4096))
        places = page * 4096 + rng.integers(0, 150, 3)
        data[places] = rng.integers(0, 256, 3)
        path.write_bytes(data.tobytes())
        try:
            read(folder)
        except UserError as error:
            assert str(path) in str(error) or str(folder) in str(error)
