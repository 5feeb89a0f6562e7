"""Grids show every image where it belongs."""

import numpy as np
import pytest

from cm.errors import UserError
from cm.generate.grids import LINE, captioned_grid, grid_scale, image_grid, labelled_rows, to_picture


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


def test_grey_grids_are_grey_and_latents_lie_side_by_side():
    grey = image_grid(np.full((2, 2, 2, 1), 7, np.uint8), columns=2)
    assert grey.mode == "L" and np.asarray(grey)[0].tolist() == [7, 7, 255, 7, 7]
    latents = np.zeros((1, 2, 2, 4), np.float32) + np.array([-1, 0, 1, 9], np.float32)
    assert np.asarray(image_grid(latents, columns=1))[1].tolist() == [0, 0, 127, 127, 255, 255, 255, 255]
    assert labelled_rows([("grey", np.zeros((1, 8, 8, 1), np.uint8))], 1).mode == "RGB"


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_latents_are_no_picture(channels):
    """Four channels, in particular, are no colour with an alpha."""
    with pytest.raises(UserError, match=f"samples of {channels} channels are latents .* write them to an npz"):
        to_picture(np.zeros((8, 8, channels), np.uint8))


def test_a_caption_stands_under_each_image():
    images = np.random.default_rng(0).integers(0, 100, (3, 32, 32, 3), dtype=np.uint8)
    plain, sheet = (np.asarray(captioned_grid(images, names, columns=2, scale=2))
                    for names in ((), ("cat", "", "Welsh springer spaniel")))
    assert plain.tobytes() == image_grid(images, 2, 2).tobytes(), "without captions it is the grid as it always was"
    assert sheet.shape == (2 * (64 + LINE) + 1, 129, 3)
    assert (sheet[:64, :64] == plain[:64, :64]).all() and (sheet[64 + LINE + 1:-LINE, :64] == plain[65:, :64]).all()
    captions = sheet[64:64 + LINE, :64], sheet[64:64 + LINE, 65:], sheet[-LINE:, :64]
    cat, none, spaniel = ((caption < 128).any(axis=(0, 2)) for caption in captions)     # columns with a letter
    assert not none.any() and 10 < cat.sum() < spaniel.sum() and spaniel[0] == spaniel[-1] == 0
    assert abs(np.flatnonzero(cat).mean() - 32) < 3, "in the middle"
    assert captioned_grid(images[..., :1], "abc", 3).mode == "L"


def test_a_long_caption_ends_in_dots():
    same = [np.asarray(captioned_grid(np.zeros((1, 8, 64, 3), np.uint8), [text], 1)) for text in (
        "Welsh springer spaniel", "Welsh springer spaniel and its friends", "tiny")]
    assert (same[0] == same[1]).all() and (same[0] != same[2]).any()
