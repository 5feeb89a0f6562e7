"""The distance is the evaluator's, wherever the reference's statistics come from."""

import numpy as np
import pytest
import torch as th

from cm.registry import UserError
from evaluations.evaluator import evaluate
from evaluations.features import load_extractor, save_torchscript
from evaluations.frechet_over_ranks import FrechetOverRanks, over_ranks
from evaluations.metrics import Moments


class Tiny(th.nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        th.manual_seed(dim)
        self.conv = th.nn.Conv2d(3, dim, 8)

    def forward(self, images):
        return self.conv(images.float() / 255).flatten(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frechet")
    for dim in (4, 6):
        save_torchscript(Tiny(dim), str(folder / f"{dim}.ts"), "tiny", "none")
    rng = np.random.default_rng(0)
    np.savez(folder / "ref.npz", arr_0=rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    np.savez(folder / "samples.npz", arr_0=rng.integers(0, 200, (31, 8, 8, 3), dtype=np.uint8))
    return folder


@pytest.fixture
def extractor(folder):
    return load_extractor(str(folder / "4.ts"))


@pytest.fixture
def samples(folder):
    return np.load(folder / "samples.npz")["arr_0"]


def store_statistics(path, images, extractor, **extra):
    features = extractor.extract(images).pool.astype(np.float64)
    np.savez(path, mu=features.mean(0), sigma=np.cov(features.T), **extra)
    return str(path)


@pytest.mark.parametrize("batch_size", [1, 7, 31])
def test_distance_is_the_evaluators(folder, extractor, samples, batch_size):
    theirs = evaluate(str(folder / "ref.npz"), str(folder / "samples.npz"), extractor, metrics=["fid"])
    frechet = FrechetOverRanks(str(folder / "ref.npz"), extractor, 8, batch_size)
    ours = frechet.distance(np.array_split(samples, range(batch_size, 31, batch_size)))
    # Convolutions of batches of other sizes round differently in float32: 1e-7 of the features.
    assert ours == pytest.approx(theirs["metrics"]["frechet_distance"]["value"], rel=1e-5)
    assert theirs["metrics"]["frechet_distance"]["label"] == frechet.label


def test_stored_statistics_serve_as_well_as_images(folder, extractor, samples, tmp_path):
    ref = np.load(folder / "ref.npz")["arr_0"]
    stored = store_statistics(tmp_path / "stored.npz", ref, extractor, num_images=50)
    by_images, by_statistics = (
        FrechetOverRanks(path, extractor, 8, 16).distance([samples]) for path in (str(folder / "ref.npz"), stored)
    )
    assert by_statistics == pytest.approx(by_images, rel=1e-5)


def test_features_of_another_network_are_refused(folder, extractor, tmp_path):
    ref = np.load(folder / "ref.npz")["arr_0"]
    other = load_extractor(str(folder / "6.ts"))
    foreign = store_statistics(tmp_path / "foreign.npz", ref, extractor)
    with np.load(foreign) as content:
        np.savez(foreign, **content, extractor="torchscript-0")
    with pytest.raises(UserError, match="of torchscript-0, and the extractor given is torchscript-.* with 4"):
        FrechetOverRanks(foreign, extractor, 8, 16)
    wide = store_statistics(tmp_path / "wide.npz", ref, other)
    with pytest.raises(UserError, match="stores 6 features of an extractor it does not name"):
        FrechetOverRanks(wide, extractor, 8, 16)


def test_a_single_reference_image_is_refused(extractor, tmp_path):
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="has 1 image"):
        FrechetOverRanks(str(tmp_path / "one.npz"), extractor, 8, 16)


def test_moments_are_left_as_they_were():
    moments = Moments(2)
    moments.update(np.array([[1.0, 2.0], [3.0, 5.0]]))
    total = over_ranks(moments)
    assert total.n == 2 and np.array_equal(total.s, [4, 7])
