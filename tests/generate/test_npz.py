"""Samples become pixels, and rows in any order one npz."""

import numpy as np
import torch as th

from cm.generate.npz import NpzWriter, to_uint8


def test_pixels_are_truncated_as_published_numbers_were():
    values = th.tensor([-2.0, -1.0, -1 + 0.999 / 127.5, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 0, 127, 191, 255, 255]
    assert to_uint8(th.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_rows_in_any_order_make_one_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    writer = NpzWriter(str(tmp_path), 5, 4, 4, with_labels=True)
    for rows in ([3, 4], [0], [2, 1]):
        writer.put(np.array(rows), images[rows], np.array(rows) * 10)
    path = writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["samples_5x4x4x3.npz"]
    with np.load(path, allow_pickle=False) as saved:
        assert np.array_equal(saved["arr_0"], images)
        assert saved["arr_1"].tolist() == [0, 10, 20, 30, 40]


def test_without_labels_there_is_no_arr_1(tmp_path):
    writer = NpzWriter(str(tmp_path), 1, 2, 2, with_labels=False)
    writer.put(np.array([0]), np.zeros((1, 2, 2, 3), np.uint8), None)
    with np.load(writer.close()) as saved:
        assert saved.files == ["arr_0"]
