"""The directory of a zip as arrays, beside zipfile's objects."""

import io
import struct
import zipfile

import numpy as np
import pytest

from cm.io import untrusted, zip_directory
from cm.io.zip_directory import read_content, read_directory

RNG = np.random.default_rng(0)


def archive_of(members, before=b"", comment=b"", extra=b"", kind=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.compress_type, info.extra = kind, extra
            archive.writestr(info, data)
        archive.comment = comment
    return before + out.getvalue()


def members(count=50):
    return [(f"{'d' * int(RNG.integers(1, 60))}/{i}.png", RNG.bytes(int(RNG.integers(0, 300)))) for i in range(count)]


def compare(data):
    """Every column, and every content, with zipfile's."""
    theirs, ours = untrusted.open_zip(io.BytesIO(data)), read_directory(io.BytesIO(data))
    infos = theirs.infolist()
    assert list(ours.names) == [info.filename for info in infos]
    for column, field in zip(ours.columns, ("header_offset", "compress_size", "file_size", "compress_type", "CRC")):
        assert ours.columns[column].tolist() == [getattr(info, field) for info in infos], column
    def read_at(start, size):
        return data[start : start + size]

    for i, info in enumerate(infos):
        assert read_content(read_at, ours.member(i)) == theirs.read(info)
    return ours


@pytest.fixture(params=[4096, 2**20])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(zip_directory, "BLOCK_BYTES", request.param)


@pytest.mark.parametrize("how", [
    {}, {"before": b"#!/bin/sh\n"}, {"comment": b"a comment"}, {"comment": b"PK\x05\x06 in a comment" + bytes(30)},
    {"extra": b"\x99\x99\x04\x00abcd"}, {"kind": zipfile.ZIP_DEFLATED}, {"extra": b"\x99\x99\x50\x00" + b"PK\1\2" * 20},
], ids=str)
def test_columns_are_those_of_zipfile(block_bytes, how):
    if how.get("comment", b"").startswith(b"PK"):
        with pytest.raises(zipfile.BadZipFile):
            read_directory(io.BytesIO(archive_of(members(3), **how)))
        return
    compare(archive_of(members(200), **how))


def test_names_of_every_encoding(block_bytes):
    """UTF-8 where a flag says so, else the first PCs' letters; a name that holds the mark of a member."""
    ours = compare(archive_of([("é/空.png", b"1"), ("PK\1\2" * 12 + ".png", b"2"), ("plain.png", b"3")]))
    assert ours.names[0] == "é/空.png"
    data = archive_of([("caf_.png", b"1")]).replace(b"caf_", b"caf\x82")
    assert compare(data).names[0] == "café.png"
    data = archive_of([("é.png", b"1")]).replace("é".encode(), b"\xff\xff")
    with pytest.raises(zipfile.BadZipFile, match="can't decode"):
        read_directory(io.BytesIO(data))


def wide(order, behind=b"", values=None):
    """An archive whose directory keeps these numbers in the extra field of zip64."""
    data = archive_of([("a.png", b"12345")], before=b"x" * 7)
    place = data.index(b"PK\1\2")
    numbers = values or {"file_size": 5, "compress_size": 5, "header_offset": 0}
    field = struct.pack(f"<HH{len(order)}Q", 1, 8 * len(order), *(numbers[name] for name in order))
    extra = behind + field
    head = bytearray(data[place : place + 46])
    for name, at in (("compress_size", 20), ("file_size", 24), ("header_offset", 42)):
        if name in order:
            head[at : at + 4] = b"\xff" * 4
    head[30:32] = struct.pack("<H", len(extra))
    directory = bytes(head) + b"a.png" + extra
    end = bytearray(data[data.index(b"PK\5\6") :])
    end[12:16] = struct.pack("<L", len(directory))
    return data[:place] + directory + bytes(end)


@pytest.mark.parametrize("order", [
    ["header_offset"], ["file_size"], ["file_size", "compress_size"], ["compress_size", "header_offset"],
    ["file_size", "compress_size", "header_offset"],
])
@pytest.mark.parametrize("behind", [b"", b"\x99\x99\x04\x00abcd"])
def test_numbers_beyond_32_bits(order, behind):
    compare(wide(order, behind))


def test_numbers_beyond_32_bits_that_are_not_there():
    data = wide(["file_size", "header_offset"])
    short = data.replace(struct.pack("<HH", 1, 16), struct.pack("<HH", 1, 8))
    for read in (read_directory, untrusted.open_zip):
        with pytest.raises(zipfile.BadZipFile, match="Corrupt"):
            read(io.BytesIO(short))
    far = wide(["header_offset"], values={"header_offset": 2**64 - 1})
    assert read_directory(io.BytesIO(far)).member(0).header_offset > len(far)


def test_an_archive_that_ends_as_zip64(monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    data = archive_of(members(9), before=b"before")
    assert b"PK\6\6" in data
    compare(data)


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:20], lambda data: b"",
    lambda data: data.replace(b"PK\1\2", b"PK\1\3", 1),
    lambda data: data.replace(b"PK\1\2", b"PK\1\3"),
    lambda data: data[: data.rindex(b"PK\1\2")] + data[data.index(b"PK\5\6") :],
    lambda data: patched_end(data, 12, 2**32 - 2),
    lambda data: patched_end(data, 12, 60),
    lambda data: data.replace(b"PK\1\2\x14\x03\x14", b"PK\1\2\x14\x03\x7f", 1),
])
def test_damaged_directories_are_refused(block_bytes, damage):
    data = damage(archive_of(members(9)))
    with pytest.raises(zipfile.BadZipFile):
        read_directory(io.BytesIO(data))


def patched_end(data, at, value):
    place = data.index(b"PK\5\6") + at
    return data[:place] + struct.pack("<L", value) + data[place + 4 :]


def test_what_is_refused_is_what_the_slow_way_refuses():
    """Members of every harmful kind between harmless ones: the same message for the same member."""
    names = ["/x.png", "..\\x.png", "a/../b.png", "C:/x.png", "a..b.png", "x/C:/y.png", "", "\\x.png", "...", "a/.b/c"]
    for name in names:
        same_answer(archive_of([("good.png", b"1"), (name, b"2"), ("also.png", b"3")]))
    data = archive_of([("good.png", b"1"), ("bad.png", b"22"), ("also.png", b"3")])
    place = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)        # of the second member
    for at, size, value in ((8, 2, 1), (10, 2, 12), (38, 4, 0o120777 << 16), (24, 4, 3), (20, 4, 2**31),
                            (24, 4, 2**31)):
        changed = data[: place + at] + value.to_bytes(size, "little") + data[place + at + size :]
        with pytest.raises(zipfile.BadZipFile, match="its member 'bad.png'"):
            read_directory(io.BytesIO(changed))
        same_answer(changed)


def same_answer(data):
    answers = []
    for read in (read_directory, untrusted.open_zip):
        try:
            read(io.BytesIO(data))
            answers.append("")
        except zipfile.BadZipFile as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


def test_members_that_overlap_are_refused():
    data = archive_of([("a.png", bytes(1000))] * 1)
    place, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    directory = data[place:end] * 3
    tail = patched_end(data[:place] + directory + data[end:], 12, len(directory))
    with pytest.raises(zipfile.BadZipFile, match="its members overlap"):
        read_directory(io.BytesIO(tail))


def test_damaged_contents_are_refused():
    data = bytearray(archive_of([("a.png", b"12345" * 100)], kind=zipfile.ZIP_DEFLATED))
    member = read_directory(io.BytesIO(bytes(data))).member(0)
    for place, value in ((0, 0), (40, 1)):
        broken = bytearray(data)
        broken[place] ^= value or 0xFF
        with pytest.raises(untrusted.DAMAGE):
            read_content(lambda start, size, broken=broken: bytes(broken[start : start + size]), member)


def test_a_large_content_is_read_apart(monkeypatch):
    monkeypatch.setattr(zip_directory, "AT_ONCE_BYTES", 10)
    compare(archive_of([("a.png", b"12345678"), (f"{'b' * 200}.png", b"1" * 1000), ("c.png", b"1" * 1000)]))
