"""Which files are the images of a set, and in which order: those of a zip beside those of a folder."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from cm.data import image_names
from cm.data.image_names import image_rows
from cm.data.sources import open_source
from cm.io.names import NameTable

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
NAMES = ["b/y_0.png", "a-b_0.png", "a/x_0.png", "a/é_0.png", "a.b/x_0.png", "a/x/z_0.png"]


@pytest.mark.parametrize("key_bytes", [2**27, 1])
def test_images_of_a_zip_come_in_the_order_of_a_folder(tmp_path, monkeypatch, key_bytes):
    """However they lie in it; of the same name twice the last counts, as for zipfile."""
    monkeypatch.setattr(image_names, "KEY_BYTES", key_bytes)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, pixels in zip(NAMES, PIXELS):
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "set" / name)
            archive.write(tmp_path / "set" / name, name)
    folder, zipped = (open_source(str(tmp_path / name), 8) for name in ("set", "x.zip"))
    assert list(zipped._names) == list(folder._names) == sorted(NAMES, key=lambda name: name.split("/"))
    assert zipped.name(0) == "a/x/z_0.png" and zipped.class_names == folder.class_names
    np.testing.assert_array_equal(zipped.images(np.arange(6)), folder.images(np.arange(6)))
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.write(tmp_path / "set" / "b/y_0.png", "a-b_0.png")
    again = open_source(str(tmp_path / "x.zip"), 8)
    assert list(again._names) == list(folder._names)
    np.testing.assert_array_equal(again.image(list(again._names).index("a-b_0.png")), PIXELS[0])


@pytest.mark.parametrize("key_bytes", [2**27, 1])
def test_rows_of_images(monkeypatch, key_bytes):
    """Beside a sort of lists: letters before and after a slash, hidden files, other files, names that begin alike."""
    monkeypatch.setattr(image_names, "KEY_BYTES", key_bytes)
    rng = np.random.default_rng(0)
    names = {"".join(rng.choice(list("ab/!~é."), rng.integers(1, 9))) + ".PnG" for _ in range(300)}
    names = [*names, "x.txt", "a/.x.png", ".b/x.png", "a.jpeg/x"]
    rng.shuffle(names)
    expected = sorted((name for name in names if name.lower().endswith(".png")
                       and not name.rpartition("/")[2].startswith(".")), key=lambda name: name.split("/"))
    for order in (names, sorted(names, key=lambda name: name.split("/"))):
        rows = image_rows(NameTable.of(name.encode() for name in order))
        assert [order[row] for row in rows] == expected
