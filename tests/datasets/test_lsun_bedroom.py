"""datasets/lsun_bedroom.py on a small database made here."""

import io
import os
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from cm.data.sources import open_source
from cm.errors import UserError
from cm.io.atomic import temporary_path
from support.as_module import as_module
from support.warm import python

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "lsun_bedroom.py"
SIZES = [(40, 24), (16, 16), (17, 64), (100, 33), (8, 12)]               # width, height


@pytest.fixture(scope="module")
def lsun():
    return as_module(SCRIPT)


def pictures() -> list[bytes]:
    rng, encoded = np.random.default_rng(0), []
    for width, height in SIZES:
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, format="WEBP", lossless=True)
        encoded.append(file.getvalue())
    return encoded


def database(folder: Path, entries: list[bytes]) -> Path:
    with lmdb.open(str(folder), map_size=2**22) as env, env.begin(write=True) as transaction:
        for i, data in enumerate(entries):
            transaction.put(f"{i:03d}_hash".encode(), data)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_images_are_those_that_the_loader_would_cut(lsun, tmp_path):
    """The same pixels as reading the originals at that size; the prefix is the class."""
    out, originals = tmp_path / "out", tmp_path / "originals"
    lsun.main([str(database(tmp_path / "lmdb", pictures())), str(out), "--image-size", "16", "--prefix", "cat"])
    assert names(out) == [f"cat_{i:07d}.png" for i in range(5)]
    originals.mkdir()
    for i, data in enumerate(pictures()):
        (originals / f"x_{i}.webp").write_bytes(data)
    made, direct = open_source(str(out), 16), open_source(str(originals), 16)
    assert np.array_equal(made.images(np.arange(5)), direct.images(np.arange(5)))
    assert np.asarray(Image.open(out / "cat_0000000.png")).shape == (16, 16, 3)
    assert made.num_classes == 1


def test_the_size_of_the_published_models_is_the_default(lsun, tmp_path):
    lsun.main([str(database(tmp_path / "lmdb", pictures()[:1])), str(tmp_path / "out")])
    assert Image.open(tmp_path / "out" / "bedroom_0000000.png").size == (256, 256)


def test_corrupt_entries_are_named_counted_and_keep_their_number(lsun, tmp_path, capsys):
    good = pictures()
    broken = [good[0], b"no picture", good[1], b"", good[2][: len(good[2]) // 2]]
    lsun.main([str(database(tmp_path / "lmdb", broken)), str(tmp_path / "out"), "--image-size", "8"])
    assert names(tmp_path / "out") == ["bedroom_0000000.png", "bedroom_0000002.png"]
    told = capsys.readouterr()
    assert "it is not an image" in told.err and "BytesIO" not in told.err
    assert all(key in told.err for key in ("001_hash", "003_hash", "004_hash")) and "000_hash" not in told.err
    assert "2 images written, 0 were there already, 3 could not be read" in told.out


def test_it_goes_on_where_it_was(lsun, tmp_path, capsys):
    command = [str(database(tmp_path / "lmdb", pictures())), str(tmp_path / "out"), "--image-size", "8"]
    lsun.main(command)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "bedroom_0000003.png").unlink()
    (tmp_path / "out" / "bedroom_0000001.png").write_bytes(b"mine")                 # what is there is left alone
    abandoned = Path(temporary_path(str(tmp_path / "out" / "bedroom_0000003.png")))  # where it was killed
    abandoned.write_bytes(b"half an image")
    os.utime(abandoned, (0, 0))
    capsys.readouterr()
    lsun.main(command)
    assert "1 images written, 4 were there already, 0 could" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole | {
        "bedroom_0000001.png": b"mine"
    }


def test_images_of_another_size_are_not_taken_for_done(lsun, tmp_path):
    folder, out = str(database(tmp_path / "lmdb", pictures())), tmp_path / "out"
    lsun.main([folder, str(out), "--image-size", "8"])
    with pytest.raises(UserError, match="--image-size 16: .*bedroom_0000000.png has side 8, from an earlier"):
        lsun.main([folder, str(out), "--image-size", "16"])
    lsun.main([folder, str(out), "--image-size", "16", "--prefix", "other"])
    assert len(names(out)) == 10


def test_more_images_than_one_chunk(lsun, tmp_path):
    lsun.main([str(database(tmp_path / "lmdb", pictures() * 8)), str(tmp_path / "out"), "--image-size", "4",
               "--workers", "2"])
    assert len(names(tmp_path / "out")) == 40


def truncated(tmp_path):
    path = database(tmp_path / "lmdb", pictures())
    (path / "data.mdb").write_bytes((path / "data.mdb").read_bytes()[:100])
    return path


BAD = {
    "nothing there": (lambda tmp: tmp / "nowhere", [], "not an lmdb folder"),
    "not a database": (truncated, [], "cannot be read as an lmdb database"),
    "empty": (lambda tmp: database(tmp / "lmdb", []), [], "is empty"),
    "no pictures": (lambda tmp: database(tmp / "lmdb", [b"x", b"y"]), [], "none of 2 entries"),
    "no size": (lambda tmp: database(tmp / "lmdb", pictures()), ["--image-size", "0"], "--image-size 0"),
    "workers": (lambda tmp: database(tmp / "lmdb", pictures()), ["--workers", "1000"], "--workers 1000: .* 256"),
    "path as prefix": (lambda tmp: database(tmp / "lmdb", pictures()), ["--prefix", "a/b"], "--prefix 'a/b'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(lsun, tmp_path, name):
    make, options, message = BAD[name]
    with pytest.raises(UserError, match=message):
        lsun.main([str(make(tmp_path)), str(tmp_path / "out"), *options])


def test_a_disk_that_takes_no_more(lsun, tmp_path, monkeypatch):
    def full(path, new):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot write .*bedroom_0000000.png: No space left.*MiB are free.*Free some"):
        lsun.main([str(database(tmp_path / "lmdb", pictures())), str(tmp_path / "out"), "--image-size", "4"])


def test_the_command(tmp_path):
    done = python([SCRIPT, database(tmp_path / "lmdb", pictures()), tmp_path / "out", "--image-size", "8"])
    assert done.rc == 0 and "5 images written" in done.stdout, done
    assert python([SCRIPT, tmp_path / "nowhere", tmp_path / "out"]).stderr.startswith("error: ")
