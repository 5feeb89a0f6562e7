"""What a file may cost: bytes, values, depth and time are counted, and only files are opened."""

import json
import os

import pytest

from cm.errors import UserError
from cm.io import budget
from cm.io.budget import Budget, Meter, open_regular, parse_json, read_bytes, read_text


def test_json_within_a_budget_is_read_and_beyond_it_refused():
    content = {"a": [1, -2, 3.5, "x,y", None], "b": {"c": [True]}}
    assert parse_json(json.dumps(content)) == parse_json(json.dumps(content).encode()) == content
    limits = Budget(bytes=100, nodes=5, depth=3)
    assert parse_json("[1,2,3,4]", limits) == [1, 2, 3, 4]
    assert parse_json("[[[1]]]", limits) == [[[1]]]
    for text, message in (("[" + "1" * 100 + "]", "100 bytes"), ("[1,2,3,4,5]", "5 values"), ("[[[[1]]]]", "3 levels"),
                          ("[" * 50 + "]" * 50, "values"), ("[", "Expecting")):
        with pytest.raises(ValueError, match=message):
            parse_json(text, limits)
    with pytest.raises(ValueError, match="400 digits"):
        parse_json("1" + "0" * 399)
    with pytest.raises(ValueError, match="nested"):
        parse_json("[" * 10**5, Budget(10**6))


def test_a_file_is_measured_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"a,b\nc\xff,d\n")
    assert read_bytes(path, Budget(10)) == path.read_bytes()
    assert read_text(path, Budget(10, 4)) == "a,b\nc\ufffd,d\n"
    with pytest.raises(ValueError, match="3 cells"):
        read_text(path, Budget(10, 3))
    path.write_bytes(bytes(10))
    monkeypatch.setattr(budget, "read_file", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="9 bytes"):
        read_bytes(path, Budget(9))


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / "pipe", "named pipe"), (tmp_path / "zero", "device"), (tmp_path, "folder")):
        with pytest.raises(UserError, match=f"{path} is a {kind}, where a file is expected"):
            open_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_meter_counts_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    meter = Meter(Budget(10, 10, 10, seconds=5))
    now[0] = 5.0
    meter.spend()
    now[0] = 5.1
    with pytest.raises(ValueError, match="more than 5 s"):
        meter.spend()
