"""Arrays of any number of channels: grey, RGB, latents."""

import numpy as np
import pytest
from PIL import Image

from cm.data.loader import load_data
from cm.data.reference_batches import with_references
from cm.data.sources import open_source
from cm.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LATENTS = RNG.normal(size=(6, 8, 8, 4))


@pytest.fixture
def npz(tmp_path):
    def save(images):
        np.savez(tmp_path / "images.npz", arr_0=images)
        return str(tmp_path / "images.npz")

    return save


@pytest.mark.parametrize("size", [8, 4])
def test_colour_becomes_its_luma(npz, size):
    source = open_source(npz(COLOUR), size, channels=1)
    assert "converted to their luma" in source.note
    luma = COLOUR.astype(float) @ (0.299, 0.587, 0.114)             # ITU-R 601
    assert source.image(2).shape == (size, size, 1)
    if size == 8:
        assert np.abs(source.images(np.arange(6))[..., 0] - luma).max() <= 0.5 + 1e-3, "rounded"


def test_grey_stays_grey(npz):
    source = open_source(npz(COLOUR[..., :1]), 8, channels=1)
    assert np.array_equal(source.images(np.arange(6)), COLOUR[..., :1]) and not source.note
    assert np.array_equal(np.asarray(source.load(3)), COLOUR[3, ..., 0])


@pytest.mark.parametrize("channels, dtype", [(4, np.float64), (4, np.float16), (8, np.uint8)])
def test_latents_reach_the_network_unchanged(npz, channels, dtype):
    """Floats as they are, also beyond [-1, 1]; bytes scaled as pixels are."""
    latents = (LATENTS if channels == 4 else RNG.integers(0, 256, (6, 8, 8, 8))).astype(dtype)
    stream = load_data(data_dir=npz(latents), batch_size=6, image_size=8, channels=channels, deterministic=True,
                       random_flip=False)
    images = next(stream).images
    expected = latents / 127.5 - 1 if dtype == np.uint8 else latents.astype(np.float32)
    assert images.shape == (6, channels, 8, 8) and np.abs(images.numpy() - expected.transpose(0, 3, 1, 2)).max() < 1e-6


def test_references_of_latents_are_their_numbers(npz):
    stream = load_data(data_dir=npz(LATENTS), batch_size=2, image_size=8, channels=4, random_flip=False)
    batch = next(with_references(stream, 4, 0, 0, 1, lambda own: [own]))
    assert np.array_equal(batch.references.images[-2:].numpy(), batch.images.numpy())
    assert abs(batch.images).max() > 1.5, "which bytes could not hold"


@pytest.mark.parametrize("images, options, message", [
    (LATENTS, {}, r"float64 \[6, 8, 8, 4\].*latents \[N,H,W,C\] with --channels C \(it is 3 here\)"),
    (COLOUR.repeat(2, 3)[..., :4], {}, r"uint8 \[6, 8, 8, 4\]; images must be"),           # no alpha is made up
    (COLOUR, {"channels": 4}, "has images of 3 channels, and --channels is 4"),
    (np.where(LATENTS > 1, np.nan, LATENTS), {"channels": 4}, "NaN or infinite"),
    (LATENTS.astype(np.int64), {"channels": 4}, "latents must be floats"),
    (LATENTS, {"channels": 4, "image_size": 4}, "latents of 8x8, which cannot be resized to --image_size 4"),
])
def test_what_does_not_fit(npz, images, options, message):
    with pytest.raises(UserError, match=message):
        open_source(npz(images), **{"image_size": 8, **options})


def test_latents_cannot_be_cropped(npz):
    with pytest.raises(UserError, match="drop --random_crop"):
        next(load_data(data_dir=npz(LATENTS), batch_size=2, image_size=8, channels=4, random_crop=True))


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "1"])
@pytest.mark.parametrize("crop", [False, True])
def test_image_files_in_grey(tmp_path, mode, crop):
    picture = Image.fromarray(COLOUR[0]).convert(mode)
    picture.save(tmp_path / "a_0.png")
    source = open_source(str(tmp_path), 8, channels=1)
    assert "converted to their luma" in source.note
    expected = np.asarray(picture.convert("RGB").convert("L"))      # 1 and L have no colour to lose
    assert np.array_equal(source.image(0)[..., 0], expected)
    batch = next(load_data(data_dir=str(tmp_path), batch_size=2, image_size=6, channels=1, random_crop=crop,
                           num_workers=0))
    assert batch.images.shape == (2, 1, 6, 6)
    with pytest.raises(UserError, match="--channels 4: the image files of .* latents of other channels are read from"):
        open_source(str(tmp_path), 8, channels=4)
