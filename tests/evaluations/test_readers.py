"""What evaluations/readers.py reads out of npz files, and what it refuses."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from cm.errors import UserError
from cm.generate.npz import NpzWriter
from evaluations.engine.readers import BatchFile

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 5, 4, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "batch.npz"


def read(path, batch_size):
    return list(BatchFile(path).batches(batch_size))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size, sizes", [(4, [4, 4, 2]), (10, [10]), (64, [10]), (1, [1] * 10)])
def test_images_come_in_file_order_and_batches(path, save, batch_size, sizes):
    save(path, IMAGES)
    batches = read(path, batch_size)
    assert [len(batch) for batch in batches] == sizes
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    assert batches[0].dtype == np.uint8


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_both_npy_headers_are_read(path, version):
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array(member, IMAGES, version=version)
    np.testing.assert_array_equal(np.concatenate(read(path, 3)), IMAGES)


def test_fortran_order_is_read_too(path):
    np.savez(path, np.asfortranarray(IMAGES))
    np.testing.assert_array_equal(np.concatenate(read(path, 3)), IMAGES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_streamed_not_loaded(path, save):
    images = np.zeros((600, 64, 64, 3), np.uint8)                   # 7 MB
    images[:, ::7] = 200
    save(path, images)
    tracemalloc.start()
    total = sum(int(batch.astype(np.uint64).sum()) for batch in BatchFile(path).batches(4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == images.sum(dtype=np.uint64)
    assert peak < images.nbytes / 5


def test_reads_what_the_sampler_writes(tmp_path):
    writer = NpzWriter(str(tmp_path), 10, 5, 4, with_labels=True)
    writer.put(np.arange(10), IMAGES, np.arange(10))
    batch = BatchFile(writer.close())
    assert len(batch) == 10 and batch.image_shape == (10, 5, 4, 3)
    np.testing.assert_array_equal(np.concatenate(list(batch.batches(3))), IMAGES)
    np.testing.assert_array_equal(batch.labels(), np.arange(10))


def test_statistics_alone_are_a_legal_file(path):
    np.savez(path, mu=np.ones(3, np.float32), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=2 * np.eye(2))
    batch = BatchFile(path)
    assert not batch.has_images and len(batch) == 0 and batch.labels() is None
    pooled, spatial = batch.statistics(), batch.statistics("_s")
    assert pooled.mu.dtype == np.float64 and pooled.sigma.shape == (3, 3)
    assert pooled.extractor is None and pooled.num_images is None
    np.testing.assert_array_equal(spatial.sigma, 2 * np.eye(2))
    with pytest.raises(UserError, match="holds only statistics, no images"):
        next(batch.batches(2))


def test_identity_of_the_extractor_and_image_count_are_read(path):
    np.savez(path, mu=np.ones(3), sigma=np.eye(3), extractor="torchscript-abc", num_images=50000)
    assert BatchFile(path).statistics().extractor == "torchscript-abc"
    assert BatchFile(path).statistics().num_images == 50000


def test_images_alone_have_no_statistics_or_labels(path):
    np.savez(path, IMAGES)
    assert BatchFile(path).statistics() is None and BatchFile(path).statistics("_s") is None
    assert BatchFile(path).labels() is None


@pytest.mark.parametrize("arrays, message", [
    ({"arr_0": IMAGES.astype(np.float32)}, r"are float32, .*from \[0, 255\] with x.round"),
    ({"arr_0": IMAGES.astype(np.int64)}, r"are int64, .*x.astype\(np.uint8\)"),
    ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"are NCHW, .*x.transpose\(0, 2, 3, 1\)"),
    ({"arr_0": IMAGES[..., 0]}, r"lack an axis of channels: x\[..., None\]"),
    ({"arr_0": np.zeros((2, 8, 8, 4), np.float32)}, "holds latents of 4 channels.*decode them to images first"),
    ({"arr_0": np.zeros((2, 8, 8, 4), np.uint8)}, r"shape \(2, 8, 8, 4\)"),
    ({"arr_0": IMAGES[0, 0]}, r"shape \(4, 3\)"),
    ({"arr_0": IMAGES[:0]}, "are empty"),
    ({"arr_0": np.array([{"a": 1}], object)}, "pickled Python objects, which are never loaded"),
    ({"images": IMAGES, "y": np.zeros(3)}, "it has: images, y"),
    ({}, "it has: nothing"),
])
def test_unusable_images_are_refused_with_a_remedy(path, arrays, message):
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as error:
        BatchFile(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.ones(3)}, "both mu and sigma"),
    ({"mu": np.ones(3), "sigma": np.eye(2)}, r"\(3,\) and float64 \(2, 2\)"),
    ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "must be floats"),
    ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
    ({"mu": np.array([None]), "sigma": np.eye(1)}, "mu cannot be read"),
])
def test_unusable_statistics_are_refused(path, arrays, message):
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        BatchFile(path).statistics()


@pytest.mark.parametrize("labels", [np.zeros(9, int), np.zeros(10), np.zeros((10, 2), int)])
def test_unusable_labels_are_refused(path, labels):
    np.savez(path, IMAGES, labels)
    with pytest.raises(UserError, match="must be 10 integers, one per image"):
        BatchFile(path).labels()


def test_missing_and_foreign_files_are_refused(path, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        BatchFile(path)
    with pytest.raises(UserError, match="is not an npz file"):
        BatchFile(tmp_path)
    np.save(tmp_path / "x.npy", IMAGES)
    with pytest.raises(UserError, match="is not an npz file"):
        BatchFile(tmp_path / "x.npy")


def test_damage_is_noticed(path):
    np.savez(path, IMAGES)
    content = bytearray(path.read_bytes())
    place = content.find(IMAGES[7].tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="are damaged"):
        read(path, 4)
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": IMAGES.shape})
        member.write(IMAGES[:9].tobytes())
    with pytest.raises(UserError, match="60 bytes are missing"):
        read(path, 4)


def test_a_member_that_is_no_npy_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    with pytest.raises(UserError, match="no readable npy header"):
        BatchFile(path)


@pytest.mark.parametrize("order", ["C", "F"])
def test_grey_images_are_repeated_for_extractors(path, order):
    np.savez(path, np.asarray(IMAGES[..., :1], order=order))
    assert BatchFile(path).image_shape == (*IMAGES.shape[:3], 1)
    assert np.array_equal(np.concatenate(list(BatchFile(path).batches(2))), IMAGES[..., :1].repeat(3, axis=3))
GOOD = np.cov(np.random.default_rng(0).standard_normal((9, 4)).T)
NO_STATISTICS = {
    "negative": (np.zeros(4), -np.eye(4), "a variance is -1"),
    "not symmetric": (np.zeros(4), GOOD + np.eye(4, k=1), "not symmetric"),
    "large mean": (np.array([0, 0, 1e300, 0]), GOOD, r"values beyond 1e\+30"),
    "large covariance": (np.zeros(4), 1e80 * GOOD, r"values beyond 1e\+30"),
    "no covariance": (np.zeros(4), np.ones((4, 4)) + 4 * (1 - np.eye(4)), "larger than its two variances allow"),
}


@pytest.mark.parametrize("name", NO_STATISTICS)
def test_statistics_that_no_features_have_are_refused(tmp_path, name):
    mu, sigma, message = NO_STATISTICS[name]
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    with pytest.raises(UserError, match=f"ref.npz: mu and sigma are no mean and covariance .*{message}"):
        BatchFile(tmp_path / "ref.npz").statistics()


def test_statistics_in_single_precision_are_read(tmp_path):
    x = np.random.default_rng(1).standard_normal((20, 50)) * np.logspace(-4, 2, 50)     # of less than full rank
    sigma = np.cov(x.T).astype(np.float32)
    sigma[3, 7] *= 1 + 1e-6                                 # as sums in another order round
    np.savez(tmp_path / "ref.npz", mu=x.mean(0).astype(np.float32), sigma=sigma)
    np.testing.assert_array_equal(BatchFile(tmp_path / "ref.npz").statistics().sigma, sigma)
