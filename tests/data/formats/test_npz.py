"""Arrays of any number of channels: grey, RGB, latents."""

import numpy as np
import pytest
from PIL import Image

from cm.data import image_source
from cm.data.formats.npz import ArraySource, StoredArraySource
from cm.data.loader import load_data
from cm.data.reference_batches import with_references
from cm.data.sources import open_source
from cm.errors import UserError
from cm.io import untrusted

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LATENTS = RNG.normal(size=(6, 8, 8, 4))


@pytest.fixture(params=["in memory", "in the file"])
def npz(tmp_path, monkeypatch, request):
    if request.param == "in the file":
        monkeypatch.setattr(image_source, "CACHE_BYTES", 100)

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
        open_source(npz(images), **{"image_size": 8, **options}).images(np.arange(6))


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


# --- large files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_array_stays_in_its_file(tmp_path, monkeypatch, channels, size):
    labels = np.arange(6) % 3
    np.savez(tmp_path / "x.npz", arr_1=labels, arr_0=COLOUR, class_names=np.array(["a", "b", "c"]))
    sources = [open_source(str(tmp_path / "x.npz"), size, channels=channels)]
    monkeypatch.setattr(image_source, "CACHE_BYTES", COLOUR.nbytes - 1)
    read = {"arr_1": untrusted.read_member_array, "class_names": untrusted.read_member_array}
    monkeypatch.setattr(untrusted, "read_member_array", lambda archive, key: read[key](archive, key))
    sources.append(open_source(str(tmp_path / "x.npz"), size, channels=channels))
    monkeypatch.undo()
    assert [type(source) for source in sources] == [ArraySource, StoredArraySource]
    kept, stored = sources
    for i in range(6):
        np.testing.assert_array_equal(stored.image(i), kept.image(i))
        np.testing.assert_array_equal(np.asarray(stored.load(i)), np.asarray(kept.load(i)))
        assert stored.name(i) == kept.name(i)
    assert (stored.note, stored.class_names, stored.labels.tolist()) == (kept.note, kept.class_names, labels.tolist())
    assert len(stored) == 6 and not stored.holds_floats
    stored.keep_decoded(10**6)
    np.testing.assert_array_equal(stored.images(np.arange(6)), kept.images(np.arange(6)))
    (tmp_path / "x.npz").write_bytes(b"")
    np.testing.assert_array_equal(stored.images(np.arange(6)), kept.images(np.arange(6)))     # kept by now


@pytest.mark.parametrize("save, images", [(np.savez_compressed, COLOUR), (np.savez, np.asfortranarray(COLOUR))])
def test_arrays_that_cannot_be_read_in_parts_are_read_at_once(tmp_path, monkeypatch, save, images):
    monkeypatch.setattr(image_source, "CACHE_BYTES", 100)
    save(tmp_path / "x.npz", arr_0=images)
    np.testing.assert_array_equal(open_source(str(tmp_path / "x.npz"), 8).images(np.arange(6)), COLOUR)


def test_a_large_file_that_shrinks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(image_source, "CACHE_BYTES", 100)
    np.savez(tmp_path / "x.npz", arr_0=COLOUR)
    source = open_source(str(tmp_path / "x.npz"), 8)
    np.testing.assert_array_equal(source.images(np.array([5, 0])), COLOUR[[5, 0]])
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:900])
    with pytest.raises(UserError, match="x.npz image 5 cannot be read: the file was cut off"):
        source.image(5)
