"""Files of a folder in order, beside os.walk."""

import os

import pytest

from cm.io import storage
from cm.io.listing import files_in_order
from cm.io.names import CODEC


def listed(folder, wanted=lambda name: True):
    return [name.decode(*CODEC) for name in files_in_order(str(folder), wanted)]


def test_files_come_in_the_order_of_their_parts(tmp_path):
    names = ["b.png", "a/x.png", "a/y/z.png", "a-b.png", "a.b/c", "a/z", ".hidden/f", "é/ü", "a/y-", "c/d/e/f", "空/x"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    expected = sorted(storage.files_under(str(tmp_path)), key=lambda name: name.split("/"))
    assert sorted(names) == sorted(expected) and listed(tmp_path) == expected
    assert listed(tmp_path, lambda name: name.endswith(b".png")) == [n for n in expected if n.endswith(".png")]


def test_names_that_are_no_text(tmp_path):
    """Bytes that are no UTF-8: as os.listdir names them, and in its order."""
    for name in (b"\xff.png", b"\x80.png", "é.png".encode(), "\U0001f600.png".encode(), "\ue000.png".encode()):
        try:
            (tmp_path / os.fsdecode(name)).write_bytes(b"")
        except OSError:                                             # a file system that takes text only
            return
    assert listed(tmp_path) == sorted(os.listdir(tmp_path))
    folder = os.fsdecode(b"\xfe")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "x.png").write_bytes(b"")
    assert f"{folder}/x.png" in listed(tmp_path)


def test_links(tmp_path):
    """Each folder once, wherever links lead; what is no folder is a file, also where it leads nowhere."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert listed(tmp_path) == ["a/x", "gone", "self"]
    assert sorted(storage.files_under(str(tmp_path))) == ["a/x", "gone", "self"]


@pytest.mark.parametrize("depth", [120])
def test_folders_may_be_deep(tmp_path, depth):
    (tmp_path / "/".join("d" * depth)).mkdir(parents=True)
    (tmp_path / "/".join("d" * depth) / "x").write_bytes(b"")
    assert listed(tmp_path) == ["d/" * depth + "x"]


def test_a_folder_that_is_not_there_is_empty(tmp_path):
    assert listed(tmp_path / "nowhere") == []
