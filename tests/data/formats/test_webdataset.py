"""Shards of a WebDataset: which there are, what is in them, and what is said of damage."""

import sys
import tarfile

import numpy as np
import pytest

from cm.data.formats.webdataset import TarShards
from cm.data.loader import load_data
from cm.data.sources import FORMATS, find_format, open_source, open_stream
from cm.errors import UserError
from support.shards import add, numbers, picture, write_shards


def every(data_dir):
    stream = open_stream(str(data_dir))
    return [item for part in range(stream.num_parts) for item in stream.items(part)]


def test_names_in_braces_and_folders_are_shards(tmp_path):
    folder = write_shards(tmp_path / "set", (2, 3, 1))
    (tmp_path / "set/sizes.json").write_text("{}")
    for name, expected in ((folder, 6), (f"{folder}/", 6), (f"{folder}/set-{{000..002}}.tar", 6),
                           (f"{folder}/set-{{001,002}}.tar", 4), (f"{folder}/set-001.tar", 3)):
        stream = open_stream(name)
        assert [stream.count(part) for part in range(stream.num_parts)] == [
            len(list(stream.items(part))) for part in range(stream.num_parts)
        ]
        assert len(every(name)) == expected
    with pytest.raises(UserError, match=r"set-003.tar does not exist; it stands for 4 shard\(s\), of which 1 are"):
        open_stream(f"{folder}/set-{{000..003}}.tar")
    with pytest.raises(UserError, match="are a stream, which only training can read; unpack them into a folder"):
        open_source(folder, 8)


def test_a_folder_of_pictures_with_a_tar_among_them_stays_a_folder(tmp_path):
    write_shards(tmp_path, (1,))
    (tmp_path / "cat_0.png").write_bytes(picture(0))
    assert find_format(str(tmp_path)) is FORMATS["folder"] and len(open_source(str(tmp_path), 8)) == 1


@pytest.mark.parametrize("label", ["cls", "json", ""])
def test_classes(tmp_path, label):
    items = every(write_shards(tmp_path, (2, 3), label))
    assert [item.label for item in items] == ([None] * 5 if not label else [0, 1, 2, 0, 1])


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_pictures_have_the_channels_that_are_asked_for(tmp_path, channels, mode):
    stream = load_data(data_dir=write_shards(tmp_path, (4,)), batch_size=4, image_size=8, channels=channels,
                       num_workers=0, deterministic=True)
    images = next(stream).images
    assert images.shape == (4, channels, 8, 8) and stream.source.load(0).mode == mode
    luma = np.array([0.299 * n + 0.587 * 2 * n + 0.114 * (255 - n) for n in range(4)])
    expected = luma if channels == 1 else np.arange(4)
    assert np.abs(np.array(numbers(images)) - expected).max() <= 0.5


def test_other_members_do_not_count_and_nothing_is_run(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in {"__meta__/a.png": b"", "a.txt": b"caption", "a.jpg": picture(1), "b.txt": b"alone",
                           "c/d.JSON": b"{}", "c/d.png": picture(2)}.items():
            add(archive, name, data)
        folder = tarfile.TarInfo("e.png")
        folder.type = tarfile.SYMTYPE
        folder.linkname = "/etc/passwd"
        archive.addfile(folder)
    stream = TarShards(str(tmp_path / "x.tar"))
    assert stream.count(0) == 2 and [item.name.split("'")[1] for item in stream.items(0)] == ["a.jpg", "c/d.png"]
    with pytest.raises(UserError, match="does not exist"):
        TarShards(f"pipe:touch {tmp_path}/ran; cat x.tar")
    assert not (tmp_path / "ran").exists()


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut in a member":
        data = data[:1300]
    elif how == "cut between members":
        data = data[:4096]
    elif how == "header":
        data[2048 + 10 : 2048 + 20] = b"\xff" * 10
    elif how == "no tar":
        data = bytearray(b"hello")
    path.write_bytes(data)


@pytest.mark.parametrize("how, message", [
    ("cut in a member", "is damaged after member '000000.png'"), ("cut between members", "is damaged after member"),
    ("header", "is damaged after member '000000.cls': what follows is neither a member nor the end"),
    ("no tar", "is damaged after its beginning"),
])
def test_a_damaged_shard_is_named_with_the_member(tmp_path, how, message):
    folder = write_shards(tmp_path / "set", (4,))
    damaged(tmp_path / "set/set-000.tar", how)
    for use in (every, lambda name: next(load_data(data_dir=name, batch_size=2, image_size=8, num_workers=0))):
        with pytest.raises(UserError, match=f"set-000.tar {message}.*replace it"):
            use(folder)


@pytest.mark.parametrize("members, message", [
    ({"a.png": b"hello"}, "x.tar: member 'a.png' cannot be read: it is not an image. Replace or remove it"),
    ({"a.png": picture(1), "a.cls": b"cat"}, "x.tar: member 'a.cls' contains no class: invalid literal"),
    ({"a.png": picture(1), "a.json": b"["}, "x.tar: member 'a.json' contains no class"),
    ({"a.png": picture(1), "a.json": b'{"label": -1}'}, "member 'a.json' contains no class: -1 is no class number"),
    ({"a.png": picture(1), "a.PNG": picture(1)}, "x.tar is damaged after .*duplicate file name"),
])
def test_a_bad_member_is_named(tmp_path, members, message):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in members.items():
            add(archive, name, data)
    with pytest.raises(UserError, match=message):
        next(load_data(data_dir=str(tmp_path / "x.tar"), batch_size=1, image_size=8, class_cond=True, num_workers=0))


def test_a_member_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    member = tarfile.TarInfo("a.png")
    member.size = 2**40
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(member.tobuf())
        file.truncate(2**40 + 2048)                                 # a hole: it takes no room on the disk
    with pytest.raises(UserError, match="member 'a.png' has 1,099,511,627,776 bytes, more than an image"):
        every(tmp_path / "x.tar")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match="need the package webdataset: pip install webdataset"):
        open_stream(str(tmp_path / "x.tar"))
