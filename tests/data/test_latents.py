"""Latents of mean and standard deviation: their record, their files, and the draws of training."""

import zipfile

import numpy as np
import pytest

from cm.data import latents
from cm.data.latents import EDM2, LatentRecord, merged, parse, record_for
from cm.data.loader import load_data
from cm.data.sources import may_hold_moments, open_source
from cm.errors import UserError
from support.latent_sets import MOMENTS, edm2_zip, npy

RNG = np.random.default_rng(1)


def stream(path, **options):
    return load_data(**{"data_dir": str(path), "batch_size": 3, "image_size": 8, "channels": 4, "class_cond": True,
                        "random_flip": False, "num_workers": 0, **options})


# ---- the record ----


def test_a_record_is_text_and_back():
    record = LatentRecord((1.5, -2.0), (0.25, 3.0), "symmetric", "vae", "ab12")
    assert parse(record.text(), "here") == record and parse("", "here") is None
    z = RNG.normal(size=(3, 2, 4, 4)).astype(np.float32)
    x = record.normalised(z)
    assert np.allclose(x[:, 0], (z[:, 0] - 1.5) * 2, atol=1e-6)     # 0.5 / 0.25
    assert np.allclose(record.raw(x), z, atol=1e-5)


def test_edm2s_constants_are_the_published_ones():
    z = np.array([5.81, 3.25, 0.12, -2.15], np.float32)[:, None, None]
    std = np.array([4.17, 4.62, 3.71, 3.28], np.float32)[:, None, None]
    assert np.allclose(EDM2.normalised(z), 0, atol=1e-6) and np.allclose(EDM2.normalised(z + std), 0.5, atol=1e-6)
    assert EDM2.pixels == "unit"


@pytest.mark.parametrize("text, says", [
    ("{", "is not a record"), ("[]", "is not a record"), ('{"mean": [1], "std": [0]}', "above 0"),
    ('{"mean": [1, 2], "std": [1]}', "not one for each channel"),
    ('{"mean": ["a"], "std": [1]}', "not a list of numbers"),
    ('{"mean": [1], "std": [1], "pixels": "big"}', "none of: unit, symmetric"),
    ('{"mean": [1], "std": [1], "scale": 2}', "not of the form"),
])
def test_what_is_no_record_is_refused(text, says):
    with pytest.raises(UserError, match=f"--latents: .*{says}"):
        parse(text, "--latents")


def test_records_of_different_latents_do_not_go_together():
    known = LatentRecord((0.0,), (1.0,), vae="a", sha256="11")
    unknown = LatentRecord((0.0,), (1.0,))
    assert merged(unknown, known, ("x", "y")) == known == merged(known, unknown, ("x", "y"))
    for other, says in [(LatentRecord((0.1,), (1.0,)), "mean"), (LatentRecord((0.0,), (2.0,)), "std"),
                        (LatentRecord((0.0,), (1.0,), "symmetric"), "pixels")]:
        with pytest.raises(UserError, match=f"x and y have different latents: {says} is"):
            merged(known, other, ("x", "y"))
    with pytest.raises(UserError, match="x has latents of the VAE 'a' .*, y of the VAE 'b'"):
        merged(known, LatentRecord((0.0,), (1.0,), vae="b", sha256="22"), ("x", "y"))


# ---- draws ----


def test_draws_have_the_mean_and_the_deviation_of_the_closed_form():
    """x = (mean + std n - m) / (2 d), from 10,000 draws; the standard error of a mean is std / (2 d) / 100."""
    record = LatentRecord((1.0, -1.0), (2.0, 0.25))
    one = np.stack([np.full((2, 2), value, np.float32) for value in (3.0, 0.5, 1.5, 0.1)])       # two means, two stds
    many = np.repeat(one[None], 10_000, 0)
    found = latents.drawn(many, record, 0, np.arange(len(many)))
    for channel, (mean, std) in enumerate([((3 - 1) / 4, 1.5 / 4), ((0.5 + 1) / 0.5, 0.1 / 0.5)]):
        assert abs(found[:, channel].mean(0) - mean).max() < 5 * std / 100
        assert abs(found[:, channel].std(0) / std - 1).max() < 0.04
    assert abs(np.corrcoef(found[:, :, 0, 0].T)[0, 1]) < 0.03, "channels are independent"
    assert np.array_equal(latents.drawn(many[:3], record, 0, np.array([7, 0, 9])), found[[7, 0, 9]])
    assert not np.allclose(latents.drawn(many[:3], record, 1, np.arange(3)), found[:3])


def test_training_draws_anew_in_each_epoch_and_the_same_on_any_ranks(tmp_path):
    path = edm2_zip(tmp_path / "set.zip")
    whole = stream(path, batch_size=6)
    first, second = next(whole), next(whole)
    assert first.images.shape == (6, 4, 8, 8) and first.images.dtype.is_floating_point
    images = [{int(i): x for i, x in zip(each.indices, each.images)} for each in (first, second)]
    assert all(not np.allclose(images[0][i], images[1][i]) for i in range(6)), "an image is drawn anew"
    for rank in (0, 1):
        share = next(stream(path, rank=rank, world_size=2))
        assert np.array_equal(share.images, first.images[rank::2])
        assert np.array_equal(share.cond["y"], first.cond["y"][rank::2])
    assert np.array_equal(next(stream(path, batch_size=6, start=6)).images, second.images), "it resumes"
    mean, std = np.split(MOMENTS[first.indices.numpy()], 2, 1)
    noise = (EDM2.raw(first.images.numpy()) - mean) / std
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1, "EDM2's constants, where there is no record"
    in_order = [next(stream(path, batch_size=6, deterministic=True, seed=seed)).images for seed in (0, 1)]
    assert not np.allclose(*in_order), "another seed draws others"
    reference = whole.read(first.positions.numpy())
    assert np.array_equal(reference.images, first.images), "reference images are those of their positions"


def test_the_sets_own_record_scales_them(tmp_path):
    still = MOMENTS.copy()
    still[:, 4:] = 0                                                # no noise: x is known exactly
    record = {"mean": [1, 2, 3, 4], "std": [1, 2, 4, 8], "pixels": "unit", "vae": "v", "sha256": "00"}
    path = edm2_zip(tmp_path / "set.zip", still, record)
    batch = next(stream(path))
    expected = (still[batch.indices.numpy(), :4] - np.array([1, 2, 3, 4])[:, None, None]) / (
        2 * np.array([1, 2, 4, 8])[:, None, None])
    assert np.allclose(batch.images, expected, atol=1e-6)
    with pytest.raises(UserError, match="--latents and .*set.zip have different latents: mean"):
        record_for(open_source(path, 8, latents=True).latents, EDM2.text(), 4, path)


def test_other_numbers_of_channels_need_a_record(tmp_path):
    path = edm2_zip(tmp_path / "set.zip", np.abs(RNG.normal(size=(2, 6, 8, 8))))
    with pytest.raises(UserError, match="3 channels, and no record"):
        stream(path, channels=3)
    source = open_source(path, 8, latents=True)
    source.latents = record_for(None, LatentRecord((0.0,) * 3, (1.0,) * 3).text(), 3, path)
    assert next(stream(path, channels=3, source=source)).images.shape == (3, 3, 8, 8)
    with pytest.raises(UserError, match="their record has 4"):
        record_for(None, EDM2.text(), 3, path)
    with pytest.raises(UserError, match="latents of 3 channels and side 8, and --channels 4"):
        stream(path)


# ---- files ----


@pytest.mark.parametrize("array, says", [
    (np.zeros((7, 8, 8)), r"not floats \[2C,H,W\]"), (np.zeros((8, 8)), r"not floats \[2C,H,W\]"),
    (np.zeros((8, 8, 8), int), r"not floats \[2C,H,W\]"), (np.full((8, 8, 8), np.nan), "NaN or infinite"),
    (np.full((8, 8, 8), -1.0), "below 0"), (np.zeros((8, 8, 4)), "all latents of a data set must have the same shape"),
    (np.array([[None]]), "Python objects"),
])
def test_damaged_latents_are_named(tmp_path, array, says):
    edm2_zip(tmp_path / "set.zip")
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(tmp_path / "set.zip") as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, npy(array) if name.endswith("3.npy") else good.read(name))
    source = open_source(str(path), 8, latents=True)
    with pytest.raises(UserError, match=f"img-mean-std-00000003.npy.*{says}"):
        source.images(np.arange(6))


def test_a_folder_is_as_good_as_a_zip_and_pictures_are_no_latents(tmp_path, images):
    with zipfile.ZipFile(edm2_zip(tmp_path / "set.zip")) as archive:
        archive.extractall(tmp_path / "set")
    folder, packed = (open_source(str(tmp_path / name), 8, latents=True) for name in ("set", "set.zip"))
    assert np.array_equal(folder.images(np.arange(6)), packed.images(np.arange(6)))
    assert np.array_equal(folder.images(np.arange(6)).transpose(0, 3, 1, 2), MOMENTS), "kept in memory as floats"
    assert folder.labels.tolist() == [0, 1, 2, 0, 1, 2] and folder.in_memory
    assert [may_hold_moments(str(tmp_path / name)) for name in ("set", "set.zip", "nowhere.zip")] == [True, True, False]
    assert not may_hold_moments(images) and not may_hold_moments("digits")
    with pytest.raises(UserError, match="set.zip contains latents, but images are needed"):
        open_source(str(tmp_path / "set.zip"), 8)
    with pytest.raises(UserError, match="drop --random_crop"):
        next(stream(tmp_path / "set.zip", random_crop=True))


def test_a_broken_record_is_an_error(tmp_path):
    path = edm2_zip(tmp_path / "set.zip", record={"mean": [1], "std": [-1]})
    with pytest.raises(UserError, match="set.zip: 'latents' in dataset.json cannot be used: .*above 0"):
        open_source(path, 8, latents=True)
