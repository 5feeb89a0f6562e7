"""The numbers are the evaluator's, on any number of ranks, wherever the reference's statistics come from."""

import json

import numpy as np
import pytest
import torch as th

from cm.errors import UserError
from evaluations.engine.ranks import JobRanks, over_ranks
from evaluations.engine.statistics_cache import StatisticsCache
from evaluations.evaluator import evaluate, report
from evaluations.features import load_extractor, save_torchscript
from evaluations.metrics import default_names
from evaluations.metrics.frechet import Moments
from evaluations.th_evaluator import ThEvaluator
from support.warm import mpi_program, mpiexec

N = 31


class Tiny(th.nn.Module):
    """Features, logits, spatial features; NaN for an image whose first value is 255."""

    def __init__(self, dim: int):
        super().__init__()
        generator = th.Generator().manual_seed(dim)
        self.conv = th.nn.Conv2d(3, dim, 4)
        with th.no_grad():
            for weight in self.parameters():
                weight.copy_(th.randn(weight.shape, generator=generator) / 4)

    def forward(self, images: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        x = self.conv(images.float() / 64)
        x = th.where((images[:, 0, 0, 0] == 255)[:, None, None, None], float("nan"), x)
        return x.mean((2, 3)), x.flatten(1)[:, :3], x[:, :2, :2, :2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("th")
    for dim in (4, 6):
        save_torchscript(Tiny(dim), str(folder / f"{dim}.ts"), "tiny", "none")
    rng = np.random.default_rng(0)
    np.savez(folder / "ref.npz", arr_0=rng.integers(0, 250, (50, 8, 8, 3), dtype=np.uint8))
    np.savez(folder / "samples.npz", arr_0=rng.integers(0, 200, (N, 8, 8, 3), dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def extractor(folder):
    return load_extractor(str(folder / "4.ts"), trusted=True)


@pytest.fixture
def samples(folder):
    return np.load(folder / "samples.npz")["arr_0"]


def make(folder, extractor, ref="ref.npz", **options):
    return ThEvaluator(str(folder / ref), extractor, 8, **{"batch_size": 16, **options})


def batches(images, size):
    return [(start, images[start : start + size]) for start in range(0, len(images), size)]


def values(results):
    return {key: result.value for key, result in results.items()}


def store_statistics(path, images, network, **extra):
    features = network.extract(images).pool.astype(np.float64)
    np.savez(path, mu=features.mean(0), sigma=np.cov(features.T), **extra)
    return path.name


@pytest.fixture(scope="module")
def theirs(folder, extractor):
    found = evaluate(str(folder / "ref.npz"), str(folder / "samples.npz"), extractor, metrics=list(default_names()),
                     split_size=10)
    return found["metrics"]


@pytest.mark.parametrize("batch_size", [1, 7, 31])
def test_the_numbers_are_the_evaluators(folder, extractor, samples, theirs, batch_size):
    ours = make(folder, extractor, metrics=list(default_names()), batch_size=batch_size, split_size=10)
    found = ours.evaluate(batches(samples, batch_size))
    # Convolutions of batches of other sizes round differently in float32: 1e-7 of the features.
    assert values(found) == {key: pytest.approx(fields["value"], rel=1e-5) for key, fields in theirs.items()}
    assert {key: each.label for key, each in found.items()} == {key: each["label"] for key, each in theirs.items()}
    assert found["frechet_distance"].sample_count == N and found["frechet_distance"].reference_count == 50
    assert values(ours.evaluate_file(str(folder / "samples.npz"))) == values(found)


@pytest.mark.mpi
def test_three_ranks_give_the_numbers_of_one(folder, extractor, tmp_path):
    """In shares that are uneven, cut a chunk of the score apart, and leave a rank without any image."""
    done = mpi_program(tmp_path, 3, f"""
        import json
        import numpy as np
        from cm.distributed import setup as dist
        from evaluations.features import load_extractor
        from evaluations.metrics import default_names
        from evaluations.th_evaluator import ThEvaluator

        def main():
            dist.setup_dist()
            images = np.load("{folder}/samples.npz")["arr_0"]
            evaluator = ThEvaluator("{folder}/ref.npz", load_extractor("{folder}/4.ts", trusted=True), 8, batch_size=16,
                                    metrics=list(default_names()), split_size=10)
            mine = {{0: [(4, images[4:12]), (24, images[24:])], 1: [], 2: [(0, images[:4]), (12, images[12:24])]}}
            results = evaluator.evaluate(mine[dist.get_rank()])
            from_file = evaluator.evaluate_file("{folder}/samples.npz")
            found = [{{key: each.value for key, each in r.items()}} for r in (results, from_file)]
            assert dist.all_gather_object(found) == [found] * 3
            if dist.is_main():
                print(json.dumps(found))

        dist.run(main)
        """)
    assert done.rc == 0, done
    in_memory, from_file = json.loads(done.stdout)
    alone = make(folder, extractor, metrics=list(default_names()), split_size=10)
    same = values(alone.evaluate_file(str(folder / "samples.npz")))
    assert from_file == pytest.approx(same, rel=1e-9)        # the same batches; float64 sums in another order
    assert in_memory == pytest.approx(same, rel=1e-5)        # other batches


@pytest.mark.mpi
def test_the_command_on_two_ranks(folder, tmp_path, theirs):
    done = mpiexec(2, ["evaluations/th_evaluator.py", folder / "ref.npz", folder / "samples.npz", "--inception",
                       folder / "4.ts", "--trust_extractor", "--split_size", "10", "--batch_size", "8", "--json",
                       tmp_path / "out.json"])
    assert done.rc == 0, done
    written = json.loads((tmp_path / "out.json").read_text())
    found = {key: fields["value"] for key, fields in written["metrics"].items()}
    assert found == {key: pytest.approx(fields["value"], rel=1e-5) for key, fields in theirs.items()}
    assert report(written) in done.stdout and done.stdout.count("reference: ") == 1 + 5
    assert "31 of 31" in done.stderr and "img/s" in done.stderr


def test_what_cannot_be_had_is_left_out_or_refused(folder, extractor, samples, tmp_path):
    stored = store_statistics(tmp_path / "stored.npz", samples, extractor)
    evaluator = make(tmp_path, extractor, stored, metrics=["fid"])
    with pytest.raises(UserError, match="kid cannot be computed: it needs images .*stored.npz holds only statistics"):
        make(tmp_path, extractor, stored, metrics=["fid", "kid"])
    everything = make(folder, extractor, metrics=None)
    assert everything.metrics == default_names() and not everything.skipped
    with pytest.raises(UserError, match="different sizes .*ref.npz 8x8, the images to come 16x16"):
        ThEvaluator(str(folder / "ref.npz"), extractor, 16)
    assert evaluator.evaluate([(0, samples)])["frechet_distance"].value == pytest.approx(0, abs=1e-6)


def test_labels_come_from_files_alone(folder, extractor, samples, tmp_path):
    labels = np.random.default_rng(1).integers(0, 3, N)
    np.savez(tmp_path / "labelled.npz", samples, labels)
    evaluator = make(folder, extractor, metrics=["class_accuracy"])
    found = evaluator.evaluate_file(str(tmp_path / "labelled.npz"))["class_accuracy"]
    assert found.value == (extractor.extract(samples).logits.argmax(1) == labels).mean()
    with pytest.raises(UserError, match="class_accuracy needs class labels, and images in memory have none"):
        evaluator.evaluate([(0, samples)])
    with pytest.raises(UserError, match=r"needs class labels \(arr_1\), and .*samples.npz has none"):
        evaluator.evaluate_file(str(folder / "samples.npz"))


def test_the_reference_is_measured_once(folder, extractor, samples, tmp_path):
    cache = StatisticsCache(tmp_path)
    first, second = (make(folder, extractor, metrics=["fid", "sfid"], cache=cache) for _ in range(2))
    assert {each.source for each in first.reference.values()} == {"images"}
    assert {each.source for each in second.reference.values()} == {"cached statistics"}
    assert values(first.evaluate([(0, samples)])) == values(second.evaluate([(0, samples)]))


def test_stored_statistics_serve_as_well_as_images(folder, extractor, samples, tmp_path):
    ref = np.load(folder / "ref.npz")["arr_0"]
    stored = store_statistics(tmp_path / "stored.npz", ref, extractor, num_images=50)
    by_images = make(folder, extractor).evaluate([(0, samples)])["frechet_distance"]
    by_statistics = make(tmp_path, extractor, stored).evaluate([(0, samples)])["frechet_distance"]
    assert by_statistics.value == pytest.approx(by_images.value, rel=1e-5)
    assert (by_images.reference_source, by_statistics.reference_source) == ("images", "stored statistics")
    assert by_statistics.reference_count == 50


def test_features_of_another_network_are_refused(folder, extractor, tmp_path):
    ref = np.load(folder / "ref.npz")["arr_0"]
    foreign = store_statistics(tmp_path / "foreign.npz", ref, extractor, extractor="torchscript-0")
    with pytest.raises(UserError, match="of torchscript-0, and the extractor given is torchscript-.* with 4"):
        make(tmp_path, extractor, foreign)
    wide = store_statistics(tmp_path / "wide.npz", ref, load_extractor(str(folder / "6.ts"), trusted=True))
    with pytest.raises(UserError, match="stores 6 features of an extractor it does not name"):
        make(tmp_path, extractor, wide)


def test_what_makes_no_number_is_refused(folder, extractor, samples, tmp_path):
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="has 1 image"):
        make(tmp_path, extractor, "one.npz")
    with pytest.raises(UserError, match="unknown metric 'fids'.*Did you mean 'fid'"):
        make(folder, extractor, metrics=["fids"])
    evaluator = make(folder, extractor)
    with pytest.raises(UserError, match="1 images are too few: fid need at least 2"):
        evaluator.evaluate([(0, samples[:1])])
    samples[9, 0, 0, 0] = 255                               # the extractor's cue for NaN
    with pytest.raises(UserError, match="the pool features of image 9 are not finite"):
        evaluator.evaluate(batches(samples, 8))
    with pytest.raises(UserError, match="arr_0.*needs|needs.*arr_0|holds only statistics"):
        stored = store_statistics(tmp_path / "stored.npz", samples[:8], extractor)
        evaluator.evaluate_file(str(tmp_path / stored))


def test_moments_are_left_as_they_were():
    moments = Moments(2)
    moments.update(np.array([[1.0, 2.0], [3.0, 5.0]]))
    total = over_ranks(moments, JobRanks())
    assert total.n == 2 and np.array_equal(total.s, [4, 7])
    total.s += 1
    assert np.array_equal(moments.s, [4, 7])
