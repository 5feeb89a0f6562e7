"""How pictures are cropped and resized."""

import io

import numpy as np
from PIL import Image

from cm.data.decode import centre_crop, decode


def test_whole_factors_are_block_averages():
    """Values in multiples of 16 over 4x4 blocks: the averages are whole numbers, so no rounding rule matters."""
    pixels = np.random.default_rng(1).integers(0, 16, (32, 32, 3)).astype(np.uint8) * 16
    expected = pixels.reshape(8, 4, 8, 4, 3).astype(int).mean((1, 3))
    np.testing.assert_array_equal(centre_crop(Image.fromarray(pixels), 8), expected)


def test_the_centre_of_the_longer_side_is_kept():
    """A ramp along the longer side keeps its slope: 40x64 at 16 is halved to 20x32, then shrunk to 16x26.

    The middle of 64 columns is worth 31.5, and a step of the result is 64/26 columns of the original.
    """
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (40, 64, 3))
    for picture, columns in ((ramp, lambda x: x), (ramp.transpose(1, 0, 2), lambda x: x.transpose(1, 0, 2))):
        result = columns(centre_crop(Image.fromarray(np.ascontiguousarray(picture)), 16))
        assert result.shape == (16, 16, 3) and (result == result[:1, :, :1]).all()
        expected = 31.5 + 64 / 26 * (np.arange(16) - 7.5)
        np.testing.assert_allclose(result[0, :, 0], expected, atol=1)        # two roundings to whole numbers


def test_a_picture_of_the_right_size_is_not_touched():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(pixels), 8), pixels)


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "png", **options})
    return buffer.getvalue()


def test_colours_under_full_transparency_do_not_show():
    found = []
    for hidden in ((0, 0, 0), (255, 0, 0)):
        pixels = np.zeros((16, 16, 4), np.uint8)
        pixels[..., :3] = hidden
        pixels[4:12, 4:12] = 0, 0, 255, 255
        found.append(np.asarray(decode(png(Image.fromarray(pixels)))))
    assert (found[0] == found[1]).all()
    assert (found[0][0, 0] == 255).all() and found[0][8, 8].tolist() == [0, 0, 255]


def test_a_photo_is_turned_as_its_orientation_says():
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = 6                                        # the camera was held upright: turn by a quarter
    photo = decode(png(Image.fromarray(pixels), exif=exif))
    assert photo.size == (8, 16)
    assert np.asarray(photo)[0, 0, 0] == 200 and np.asarray(photo)[-1, 0, 0] == 0
