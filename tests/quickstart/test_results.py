"""The table and the picture at the end of a chain."""

import json

import numpy as np
from PIL import Image

from cm.data.sources import open_source
from cm.quickstart import results


def samples(folder, value, **more):
    folder.mkdir()
    np.savez(folder / "samples_4x8x8x1.npz", arr_0=np.full((4, 8, 8, 1), value, np.uint8), **more)
    (folder / "samples_4x8x8x1.json").write_text(json.dumps({"network_evaluations": 2, "images_per_second": 3.4}))
    return folder


def test_a_table_has_the_columns_that_were_computed(tmp_path):
    one, two = samples(tmp_path / "one", 1), samples(tmp_path / "two", 2)
    text = results.table([results.row("ONE", one), results.row("TWO", two)], "* a note")
    assert text.splitlines()[0].split() == ["method", "NFE", "images/s"] and "a note" not in text
    (two / "metrics.json").write_text(json.dumps({"metrics": {"frechet_distance": {"value": 0.1234}}}))
    text = results.table([results.row("ONE", one), results.row("TWO", two)], "* a note").splitlines()
    assert text[0].split() == ["method", "NFE", "Frechet", "distance*", "images/s"] and text[-1] == "* a note"
    assert text[2].split() == ["ONE", "2", "3"] and text[3].split() == ["TWO", "2", "0.123", "3"]


def test_real_images_have_the_classes_of_the_samples(tmp_path):
    source = open_source("digits", 8, channels=1)
    results.write_real(tmp_path / "real.npz", source, 500)
    with np.load(tmp_path / "real.npz") as real:
        assert real["arr_0"].shape == (500, 8, 8, 1)
        labels = np.array([3, 3, 9])
        images = results.real_like(tmp_path / "real.npz", labels, 16)
        for image, label in zip(images, labels):
            twins = (real["arr_0"] == image).all((1, 2, 3))
            assert label in real["arr_1"][twins]
    assert len(results.real_like(tmp_path / "real.npz", None, 16)) == 16


def test_a_picture_has_a_row_for_each_method(tmp_path):
    results.write_real(tmp_path / "real.npz", open_source("digits", 8, channels=1), 50)
    methods = {"dark": samples(tmp_path / "dark", 0, arr_1=np.arange(4)), "light": samples(tmp_path / "light", 255)}
    results.picture(tmp_path / "out.png", tmp_path / "real.npz", "real", methods)
    with Image.open(tmp_path / "out.png") as sheet:
        column = np.asarray(sheet.convert("L"))[-80:, -60]  # through the last images of the last row
        assert (column == 255).all() and sheet.height == 3 * (64 + 8) + 8, "three rows of images, 8 times as large"
