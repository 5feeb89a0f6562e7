"""Grids show every image where it belongs."""

import numpy as np

from cm.generate.grids import grid_scale, image_grid, labelled_rows


def test_grid_shows_every_image_where_it_belongs():
    images = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = np.asarray(image_grid(images, columns=2, scale=3, gap=1))
    assert sheet.shape == (13, 13, 3)
    assert (sheet[0, 0, 0], sheet[0, 7, 0], sheet[7, 0, 0], sheet[7, 7, 0], sheet[6, 6, 0]) == (10, 20, 30, 255, 255)


def test_labelled_rows_hold_each_strip():
    black = np.zeros((3, 8, 8, 3), np.uint8)
    picture = labelled_rows([("a", black), ("longer name", black)], 4)
    pixels = np.asarray(picture)
    assert (pixels == 0).all(-1).sum() >= 2 * 3 * 32 * 32       # both strips, black, plus the letters
    assert (grid_scale(8), grid_scale(64), grid_scale(256)) == (8, 1, 1)
