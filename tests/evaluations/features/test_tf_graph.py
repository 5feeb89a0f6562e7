"""TensorFlow's frozen graph: a tiny one against numpy, and all of Inception-v3 against the PyTorch network."""

import sys

import numpy as np
import pytest

from cm.errors import UserError
from evaluations.evaluator import evaluate, report
from evaluations.features import load_extractor
from evaluations.features.graph_constants import read_constants
from evaluations.fid import calc, ref
from evaluations.metrics import default_names
from evaluations.metrics.frechet import frechet_distance
from evaluations.metrics.inception_score import inception_score
from evaluations.metrics.kid import kid
from evaluations.metrics.precision_recall import precision_recall
from support.inception_graph import tf, write_inception, write_tiny
from support.inception_stand_in import random_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    rng = np.random.default_rng(0)
    for name, count, low in (("ref", 40, 0), ("sample", 30, 60)):
        # half of the values the same all over an image: averages over 11x11 windows alone would hardly differ
        images = rng.integers(low, 256, (count, 1, 1, 3)) / 2 + rng.integers(0, 128, (count, 20, 16, 3))
        np.savez(folder / f"{name}.npz", images.astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    return write_tiny(folder / "tiny.pb")


@pytest.fixture(scope="module")
def extractor(folder, tiny):
    return load_extractor(f"{folder}/tiny.pb")


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def whole(folder, tensors):
    write_inception(folder / "classify_image_graph_def.pb", tensors)
    return f"{folder}/classify_image_graph_def.pb"


def images_of(path):
    with np.load(path) as batch:
        return batch["arr_0"]


def by_hand(images, weights):
    """What the tiny graph does, in float64."""
    n, height, width, _ = images.shape
    rows, big = np.zeros((n, 299, width, 3)), np.zeros((n, 299, 299, 3))
    for y in range(299):
        at, share = int(y * height / 299), y * height / 299 % 1
        rows[:, y] = (1 - share) * images[:, at] + share * images[:, min(at + 1, height - 1)].astype(np.float64)
    for x in range(299):
        at, share = int(x * width / 299), x * width / 299 % 1
        big[:, :, x] = (1 - share) * rows[:, :, at] + share * rows[:, :, min(at + 1, width - 1)]
    scaled = (big - 128) / 128
    cells = np.array([[scaled[:, 18 * i : 18 * i + 11, 18 * j : 18 * j + 11].mean((1, 2)) for j in range(17)]
                      for i in range(17)]).transpose(2, 0, 1, 3)
    spatial = np.maximum(cells @ weights["spatial"], 0)
    pool = np.maximum(spatial.mean((1, 2)) @ weights["pool"], 0)
    return pool, spatial[..., :7].reshape(n, -1), pool @ weights["last"]


def test_the_tiny_graph_gives_what_its_definition_gives(folder, tiny, extractor):
    images = images_of(folder / "ref.npz")[:5]
    found, expected = extractor.extract(images), by_hand(images, tiny)
    assert [array.shape for array in found] == [(5, 24), (5, 2023), (5, 10)]
    for array, definition in zip(found, expected):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, definition, rtol=0, atol=1e-5 * np.abs(definition).max())   # float32
    assert np.abs(expected[2]).max() > 0.1


def test_the_evaluators_numbers_through_tensorflow(folder, tiny, extractor):
    """End to end from two files, against the definitions on features that never saw TensorFlow."""
    metrics = [name for name in default_names() if name != "sfid"]      # 2023 dimensions cost a test too many seconds
    result = evaluate(folder / "ref.npz", folder / "sample.npz", extractor, metrics=metrics, batch_size=16,
                      split_size=20)
    (pool, _, _), (sample, _, logits) = (by_hand(images_of(folder / f"{name}.npz"), tiny) for name in ("ref", "sample"))
    precision, recall = precision_recall(pool, sample, dtype=np.float64)
    expected = {
        "inception_score": inception_score(logits, 20),
        "frechet_distance": frechet_distance(pool.mean(0), np.cov(pool.T), sample.mean(0), np.cov(sample.T)),
        "precision": precision, "recall": recall,
        "kernel_distance": kid(pool, sample, subset_size=30).mean,
    }
    found = {key: fields["value"] for key, fields in result["metrics"].items()}
    assert found == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in expected.items()}
    assert expected["frechet_distance"] > 0.01 and 0 < recall < 1
    assert extractor.id in report(result) and extractor.id.startswith("tf-") and not extractor.is_inception


def test_tensorflow_and_pytorch_see_the_same_in_the_whole_network(folder, whole):
    images = images_of(folder / "ref.npz")[:2]
    by_tensorflow, by_torch = load_extractor(whole), load_extractor(f"torch:{whole}")
    assert by_tensorflow.is_inception and by_tensorflow.id.startswith("tf-") and by_torch.id.startswith("torch-")
    for theirs, ours in zip(by_tensorflow.extract(images), by_torch.extract(images)):
        # 94 layers in float32, summed in other orders
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_calc_and_ref_go_through_tensorflow(folder, extractor, tmp_path):
    text = ref(f"{folder}/ref.npz", f"{tmp_path}/made.npz", extractor)
    assert "mu [24], mu_s [2023] of 40 images" in text and f"({extractor.id}), resize: TF1 bilinear to 299x299" in text
    by_images, by_statistics = (
        calc(f"{folder}/sample.npz", path, extractor, num=30) for path in (f"{folder}/ref.npz", f"{tmp_path}/made.npz")
    )
    assert by_images["value"] == by_statistics["value"] > 0.01
    assert "tensorflow" in by_images["versions"]


def test_a_reference_of_one_inception_is_not_compared_with_another(folder, whole, tmp_path):
    images = images_of(folder / "ref.npz")[:3]
    np.savez(tmp_path / "few.npz", images)
    inception = load_extractor(f"torch:{whole}")
    assert "mu [2048], mu_s [2023] of 3 images" in ref(f"{tmp_path}/few.npz", f"{tmp_path}/ref.npz", inception)
    with np.load(tmp_path / "ref.npz") as written:
        features = inception.extract(images).pool.astype(np.float64)
        np.testing.assert_allclose(written["mu"], features.mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=f"stores 2048 features of {inception.id}, and the extractor given is tf-"):
        calc(f"{tmp_path}/few.npz", f"{tmp_path}/ref.npz", load_extractor(whole), num=3)


def test_constants_come_out_of_a_graph_without_tensorflow(whole, tensors):
    constants = read_constants(whole)
    assert set(tensors) <= set(constants)
    for name in ("conv/conv2d_params", "mixed_10/tower/mixed/conv_1/batchnorm/gamma", "softmax/weights"):
        np.testing.assert_array_equal(constants[name], tensors[name])


def test_constants_that_are_written_short_are_whole(tmp_path):
    graph = tf.compat.v1.GraphDef()
    for name, shape, values in (("one", (2, 3), [7.0]), ("tail", (4,), [1.0, 2.0]), ("scalar", (), [5.0])):
        tensor = graph.node.add(name=name, op="Const").attr["value"].tensor
        tensor.dtype, tensor.float_val[:] = tf.float32.as_datatype_enum, values
        for size in shape:
            tensor.tensor_shape.dim.add(size=size)
    graph.node.add(name="whole", op="Const").attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.arange(3)))
    (tmp_path / "graph.pb").write_bytes(graph.SerializeToString())
    constants = read_constants(f"{tmp_path}/graph.pb")
    assert set(constants) == {"one", "tail", "scalar"}      # integers are not looked for
    np.testing.assert_array_equal(constants["one"], np.full((2, 3), 7))
    np.testing.assert_array_equal(constants["tail"], [1, 2, 2, 2])
    assert constants["scalar"].shape == () and constants["scalar"] == 5


# --- refusals ------------------------------------------------------------------------------------------------------


def test_graphs_that_are_not_inceptions_are_refused(folder, tmp_path, tiny):
    (tmp_path / "text.pb").write_bytes(b"no graph")
    with pytest.raises(UserError, match="text.pb is not a frozen TensorFlow graph, or is damaged"):
        load_extractor(f"{tmp_path}/text.pb")
    (tmp_path / "empty.pb").write_bytes(b"")
    with pytest.raises(UserError, match="lacks ExpandDims, mixed_6/conv, pool_3, softmax/logits/MatMul"):
        load_extractor(f"{tmp_path}/empty.pb")
    with pytest.raises(UserError, match="missing.pb cannot be read"):
        load_extractor(f"tf:{tmp_path}/missing.pb")
    with pytest.raises(UserError, match="tiny.pb holds no weights of the FID Inception-v3"):
        load_extractor(f"torch:{folder}/tiny.pb")


def test_without_tensorflow_the_remedy_is_named(folder, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)    # import then raises ImportError
    with pytest.raises(UserError, match=r"pip install '\.\[tf\]'.*--inception torch:PATH"):
        load_extractor(f"{folder}/tiny.pb")
