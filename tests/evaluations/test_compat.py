"""The classes of the original evaluators give this package's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from cm.errors import UserError
from evaluations.evaluator import (
    INCEPTION_V3_PATH,
    Evaluator,
    FIDStatistics,
    MemoryNpzArrayReader,
    StreamingNpzArrayReader,
    evaluate,
    open_npz_array,
)
from evaluations.features import Features, load_extractor, save_torchscript
from evaluations.features.inception_weights import read_inception
from evaluations.inception_v3 import Conv2dLayer, InceptionV3, SoftmaxModel
from evaluations.metrics.inception_score import inception_score
from evaluations.metrics.precision_recall import precision_recall
from evaluations.th_evaluator import FIDAndIS, all_gather
from support.inception_stand_in import as_pytorch_fid, random_tensors
from support.warm import mpi_program

N = 20


class Pool(th.nn.Module):
    """Five features of images [N,3,H,W], and spatial ones."""

    def __init__(self) -> None:
        super().__init__()
        th.manual_seed(0)
        self.conv = th.nn.Conv2d(3, 5, 4)

    def forward(self, images: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        x = self.conv(images.float() / 64)
        return x.mean((2, 3)), x.flatten(1)[:, :3], x[:, :2, :2, :2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compat")
    save_torchscript(Pool(), str(folder / "pool.ts"), "pool", "none")
    rng = np.random.default_rng(0)
    samples, ref = (rng.integers(0, high, (N, 8, 8, 3), dtype=np.uint8) for high in (200, 256))
    extractor = load_extractor(str(folder / "pool.ts"), trusted=True)
    features = extractor.extract(ref)
    statistics = {}
    for suffix, points in (("", features.pool), ("_s", features.spatial)):
        assert points is not None
        statistics |= {f"mu{suffix}": points.mean(0, dtype=float), f"sigma{suffix}": np.cov(points.T.astype(float))}
    np.savez(folder / "samples.npz", arr_0=samples)
    np.savez(folder / "ref.npz", arr_0=ref)
    np.savez(folder / "statistics.npz", **statistics)
    return folder


@pytest.fixture(scope="module")
def inception(folder: Path) -> str:
    th.save(as_pytorch_fid(random_tensors()), folder / "inception.pth")
    return str(folder / "inception.pth")


def batches(folder: Path, size: int) -> Iterator[Any]:
    """What load_data yields for the samples: pairs of images in [-1, 1] and conditioning."""
    pixels = th.from_numpy(np.load(folder / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    return ((part.float() / 127.5 - 1, {}) for part in pixels.split(size))


def test_fid_and_is_gives_the_evaluators_fid(folder: Path) -> None:
    fid_is = FIDAndIS(path=str(folder / "pool.ts"), trusted=True)
    fid_is.set_ref_batch(str(folder / "statistics.npz"))
    ref, ref_spatial, ref_clip = fid_is.get_ref_batch(str(folder / "statistics.npz"))
    pooled, spatial, clip, images = fid_is.get_activations(batches(folder, 8), N, 8, pr_samples=10)
    assert ref is not None and ref_spatial is not None and ref_clip is None
    assert pooled.shape == (N, 5) and spatial.shape == (N, 8) and clip.shape == (N, 0) and len(images) == 10
    expected = evaluate(str(folder / "ref.npz"), str(folder / "samples.npz"), fid_is.extractor,
                        metrics=("fid", "sfid"))["metrics"]
    for key, reference, points in (
        ("frechet_distance", ref, pooled), ("spatial_frechet_distance", ref_spatial, spatial),
    ):
        found = fid_is.get_statistics(points, 8).frechet_distance(reference)
        assert found == pytest.approx(expected[key]["value"], rel=1e-6)
    batch, virtual = fid_is.get_virtual_batch(batches(folder, 8), N, 8, resolution=8)
    assert batch is not None and len(batch) == N and set(virtual) == {"mu", "sigma", "mu_s", "sigma_s"}
    assert np.allclose(virtual["mu"], pooled.mean(0), atol=1e-6)


def test_fid_and_is_gives_the_evaluators_score(folder: Path, inception: str) -> None:
    fid_is = FIDAndIS(softmax_batch_size=3, path=inception)
    images = next(batches(folder, 4))[0]
    pred, spatial, clip, text, pixels = fid_is.get_preds(images)
    features: Features = fid_is.extractor.extract(pixels)
    assert pred.shape == (4, 2048) and spatial is not None and spatial.shape == (4, 2023) and clip is text is None
    assert (pixels == np.load(folder / "samples.npz")["arr_0"][:4]).all()
    assert features.logits is not None
    score = fid_is.get_inception_score(pred.numpy(), split_size=2)
    assert score == pytest.approx(inception_score(features.logits, 2), rel=1e-5)
    with pytest.raises(UserError, match="leave captions out"):
        fid_is.get_preds(images, captions=["a cat"])


def test_what_fid_and_is_cannot_do(folder: Path) -> None:
    fid_is = FIDAndIS(path=str(folder / "pool.ts"), trusted=True)
    with pytest.raises(UserError, match="stores no statistics .* `fid.py ref`"):
        fid_is.set_ref_batch(str(folder / "ref.npz"))
    with pytest.raises(UserError, match="last layer of Inception-v3, and pool has"):
        fid_is.get_inception_score(np.zeros((3, 5), np.float32))


@pytest.mark.mpi
def test_activations_of_two_ranks(folder: Path, tmp_path: Path) -> None:
    finished = mpi_program(tmp_path, 2, f"""
        import numpy as np
        import torch as th
        from cm import dist_util
        from evaluations.th_evaluator import FIDAndIS

        dist_util.setup_dist()
        rank = dist_util.get_rank()
        fid_is = FIDAndIS(path={str(folder / "pool.ts")!r}, trusted=True)
        pixels = th.from_numpy(np.load({str(folder / "samples.npz")!r})["arr_0"]).permute(0, 3, 1, 2)
        data = iter([(part.float() / 127.5 - 1, {{}}, None) for part in pixels.split(5)[rank::2]])
        pooled, *rest = fid_is.get_activations(data, {N}, 10)
        if rank == 0:
            np.save({str(tmp_path / "pooled.npy")!r}, pooled)
        else:
            assert [pooled, *rest] == [[], [], [], []]
    """)
    assert finished.rc == 0, finished
    alone = FIDAndIS(path=str(folder / "pool.ts"), trusted=True).get_activations(batches(folder, 5), N, 5)[0]
    assert np.allclose(np.load(tmp_path / "pooled.npy"), alone, atol=1e-6)


def test_guided_diffusions_evaluator(folder: Path, inception: str) -> None:
    evaluator = Evaluator(load_extractor(str(folder / "pool.ts"), trusted=True), batch_size=7)
    evaluator.warmup()
    ref, sample = (evaluator.read_activations(str(folder / name)) for name in ("ref.npz", "samples.npz"))
    stored = evaluator.read_statistics(str(folder / "statistics.npz"), ref)
    computed = evaluator.read_statistics(str(folder / "ref.npz"), ref)
    for one, other in zip(stored, computed):
        assert one.frechet_distance(other) == pytest.approx(0, abs=1e-5)
    expected = evaluate(str(folder / "ref.npz"), str(folder / "samples.npz"), evaluator.extractor,
                        metrics=("fid", "precision_recall"))["metrics"]
    found = evaluator.compute_statistics(sample[0]).frechet_distance(stored[0])
    assert found == pytest.approx(expected["frechet_distance"]["value"], rel=1e-5)
    assert evaluator.compute_prec_recall(ref[0], sample[0]) == tuple(precision_recall(ref[0], sample[0]))
    assert expected["precision"]["value"] == evaluator.compute_prec_recall(ref[0], sample[0])[0]


def test_a_session_stands_for_inception(inception: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CM_INCEPTION", inception)
    evaluator = Evaluator(object(), softmax_batch_size=2)
    pooled, spatial = evaluator.compute_activations([np.full((3, 8, 8, 3), 100.0)])
    assert pooled.shape == (3, 2048) and spatial.shape == (3, 2023)
    assert evaluator.compute_inception_score(pooled) == pytest.approx(1)           # three times one image


def test_statistics_of_gaussians() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances."""
    one = FIDStatistics(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 64)
    other = FIDStatistics(mu=np.ones(3), sigma=np.diag([1.0, 1.0, 1.0]))
    assert one.frechet_distance(other, eps=1e-6) == pytest.approx(3 + 0 + 1 + 4) and one.resolution == 64


def test_readers_of_arrays(folder: Path, tmp_path: Path) -> None:
    expected = np.load(folder / "samples.npz")["arr_0"]
    np.savez(tmp_path / "more.npz", rows=np.arange(10.0).reshape(5, 2), turned=np.asfortranarray(np.ones((5, 2))))
    with open_npz_array(str(folder / "samples.npz"), "arr_0") as reader:
        assert isinstance(reader, StreamingNpzArrayReader) and reader.remaining() == N
        read = reader.read_batches(8)
        assert len(read) == 3
        parts = list(read)
    assert [len(part) for part in parts] == [8, 8, 4] and (np.concatenate(parts) == expected).all()
    with open_npz_array(tmp_path / "more.npz", "rows") as reader:
        first = reader.read_batch(2)
        assert first is not None and first.tolist() == [[0, 1], [2, 3]] and reader.remaining() == 3
    with open_npz_array(tmp_path / "more.npz", "turned") as reader:
        assert isinstance(reader, MemoryNpzArrayReader) and len(list(reader.read_batches(2))) == 3
        assert reader.read_batch(1) is None
    assert MemoryNpzArrayReader.load(tmp_path / "more.npz", "rows").remaining() == 5
    path = tmp_path / "more.npz"
    with pytest.raises(UserError, match="the array arr_9 cannot be read"), open_npz_array(path, "arr_9"):
        pass
    with pytest.raises(ValueError, match="mine"), open_npz_array(path, "rows"):
        raise ValueError("mine")
    assert INCEPTION_V3_PATH.endswith(".pb")


def test_inception_by_the_originals_calls(inception: str) -> None:
    network = InceptionV3()
    network.load_state_dict(read_inception(inception).state_dict())
    images = th.randint(0, 256, (2, 3, 16, 16))
    pooled, spatial = network(images)
    assert pooled.shape == (2, 2048) and spatial.shape == (2, 2023)
    probabilities = network(images, return_features=False, no_output_bias=True)
    assert th.allclose(network.create_softmax_model()(pooled), probabilities, atol=1e-6)
    assert th.allclose(network.acts_to_probs(pooled), network(images, False), atol=1e-6)
    assert th.allclose(probabilities.sum(1), th.ones(2), atol=1e-5)
    with pytest.raises(UserError, match="use_fp16"):
        network(images, use_fp16=True)


def test_layers_of_inception() -> None:
    layer = Conv2dLayer(3, 4, kh=1, kw=7, padding=[0, 3])
    layer.weight.data.fill_(1)
    layer.get_buffer("var").fill_(1)
    assert layer(th.ones(1, 3, 5, 9)).shape == (1, 4, 5, 9)
    assert SoftmaxModel(th.zeros(4, 3))(th.ones(2, 3)).tolist() == [[0.25] * 4] * 2
    assert all_gather(th.ones(2, 3)).shape == (2, 3)
