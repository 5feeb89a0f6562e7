"""Inception-v3 in PyTorch: against torchvision's, against golden resizes, and through every spelling of its weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from cm.errors import UserError
from cm.io.torchvision_shim import import_torchvision
from evaluations.features import InceptionExtractor, load_extractor
from evaluations.features.inception_v3 import InceptionV3, tf1_bilinear
from evaluations.features.inception_weights import canonical_weights, conv_names, read_inception
from evaluations.features.torchscript import quiet_torchscript
from support.golden import DATA
from support.inception_stand_in import as_pytorch_fid, random_tensors


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def weights(tensors):
    """In OpenAI's spelling, which is the network's own."""
    return canonical_weights({name: th.from_numpy(array) for name, array in tensors.items()}, "the graph")


@pytest.fixture(scope="module")
def folder(tensors, weights, tmp_path_factory):
    """The same weights in three kinds of file; their names say nothing of the kind."""
    folder = tmp_path_factory.mktemp("inception")
    th.save(weights, folder / "openai.pt")
    th.save(as_pytorch_fid(tensors), folder / "fid.pth")
    network = InceptionV3().eval()
    network.load_state_dict(weights)
    with quiet_torchscript(), th.inference_mode():
        th.jit.save(th.jit.trace(network, th.zeros(1, 3, 299, 299), check_trace=False), folder / "nvidia.pt")
    return folder


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 40, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def features(folder, images):
    return InceptionExtractor(f"{folder}/openai.pt").extract(images)


# --- the resize ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(29, 31), (7, 5)])
def test_the_resize_is_tensorflow_1s(height, width):
    with np.load(DATA / "golden_metrics.npz") as golden:
        images = th.from_numpy(golden["resize_input_nhwc_u8"]).permute(0, 3, 1, 2)
        expected = th.from_numpy(golden[f"resize_tf1_bilinear_{height}x{width}"]).permute(0, 3, 1, 2)
    th.testing.assert_close(tf1_bilinear(images.double(), height, width), expected, rtol=0, atol=1e-10)
    # float32 places of source pixels: 1e-6 of a pixel, at up to 255 grey levels a pixel
    th.testing.assert_close(tf1_bilinear(images.float(), height, width).double(), expected, rtol=0, atol=1e-3)
    torchs = F.interpolate(images.double(), (height, width), mode="bilinear", align_corners=False)
    assert (torchs - expected).abs().max() > 10             # which is what it is not


def test_an_image_of_the_networks_size_stays_as_it_is():
    images = th.rand(1, 3, 299, 299)
    assert th.equal(tf1_bilinear(images, 299, 299), images)


# --- the network ---------------------------------------------------------------------------------------------------


def test_the_names_and_shapes_are_those_of_the_published_files():
    state, names = InceptionV3().state_dict(), conv_names()
    assert len(state) == 378 and len(names) == 94
    for spelling in ("ours", "fid", "tf"):
        assert len({each[spelling] for each in names}) == 94
    known = {                                               # by hand, from the three publications
        "conv": ("Conv2d_1a_3x3", "conv", (32, 3, 3, 3)),
        "mixed.tower.conv_1": ("Mixed_5b.branch5x5_2", "mixed/tower/conv_1", (64, 48, 5, 5)),
        "mixed_3.conv": ("Mixed_6a.branch3x3", "mixed_3/conv", (384, 288, 3, 3)),
        "mixed_6.conv": ("Mixed_6d.branch1x1", "mixed_6/conv", (192, 768, 1, 1)),
        "mixed_7.tower_1.conv_4": ("Mixed_6e.branch7x7dbl_5", "mixed_7/tower_1/conv_4", (192, 192, 1, 7)),
        "mixed_8.tower_1.conv_3": ("Mixed_7a.branch7x7x3_4", "mixed_8/tower_1/conv_3", (192, 192, 3, 3)),
        "mixed_10.tower_mixed_conv_1": ("Mixed_7c.branch3x3_2b", "mixed_10/tower/mixed/conv_1", (384, 384, 3, 1)),
        "mixed_9.tower_1_conv": ("Mixed_7b.branch3x3dbl_1", "mixed_9/tower_1/conv", (448, 1280, 1, 1)),
    }
    by_name = {each["ours"]: each for each in names}
    for ours, (fid, tf, shape) in known.items():
        assert by_name[ours] == {"ours": ours, "fid": fid, "tf": tf}
        assert tuple(state[f"layers.{ours}.weight"].shape) == shape
    assert state["output.weight"].shape == (1008, 2048)


def test_the_features_are_those_of_torchvisions_network(tensors, images, tmp_path, monkeypatch):
    """It was written by others; its average pools are first made those of FID. Its normalisations have factors."""
    import_torchvision()
    from torchvision.models import inception

    def avg_pool2d(x, kernel_size, stride, padding):
        if x.shape[1] == 2048:                              # the last block
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    monkeypatch.setattr(inception, "F", SimpleNamespace(**{**vars(F), "avg_pool2d": avg_pool2d}))
    network = inception.Inception3(1008, aux_logits=False, init_weights=False).eval()
    state = as_pytorch_fid(tensors, with_gamma=True)
    th.save(state, tmp_path / "state.pth")
    features = InceptionExtractor(f"{tmp_path}/state.pth").extract(images)
    network.load_state_dict(state)                          # strict: all names are there, and no others
    found = {}
    network.avgpool.register_forward_hook(lambda _, __, output: found.update(pool=output.flatten(1)))
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: found.update(branch=output))
    x = tf1_bilinear(th.from_numpy(images).permute(0, 3, 1, 2).float(), 299, 299)
    with th.inference_mode():
        logits = network((x - 128) / 128)
    spatial = found["branch"].permute(0, 2, 3, 1)[..., :7].flatten(1)
    assert features.spatial.shape == (2, 2023)
    for ours, theirs in zip(features, (found["pool"], spatial, logits - network.fc.bias.detach())):
        scale = theirs.abs().max().item()
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5 * scale)     # 94 layers in float32


# --- its weights ---------------------------------------------------------------------------------------------------


def test_every_spelling_gives_the_same_network(folder, images, features):
    loaded = {name: load_extractor(f"{folder}/{name}") for name in ("openai.pt", "fid.pth", "nvidia.pt")}
    assert len({extractor.id for extractor in loaded.values()}) == 1
    assert all(type(extractor) is InceptionExtractor and extractor.is_inception for extractor in loaded.values())
    for extractor in loaded.values():
        np.testing.assert_array_equal(extractor.extract(images).pool, features.pool)


def test_half_of_a_network_is_refused(weights, tmp_path):
    def saved(state):
        th.save(state, tmp_path / "state.pt")
        return f"{tmp_path}/state.pt"

    with pytest.raises(UserError, match="lack the tensor layers.mixed_5.conv.var"):
        read_inception(saved({name: value for name, value in weights.items() if name != "layers.mixed_5.conv.var"}))
    with pytest.raises(UserError, match="does not hold the FID Inception-v3: size mismatch for output.bias"):
        read_inception(saved(weights | {"output.bias": th.zeros(1000)}))
    with pytest.raises(UserError, match="holds no weights of the FID Inception-v3, in none of the spellings openai, "):
        read_inception(saved({"weight": th.zeros(2)}))
    with pytest.raises(UserError, match="holds a list, not the state dict"):
        read_inception(saved([1, 2]))


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    th.save(print, tmp_path / "evil.pkl")
    with pytest.raises(UserError, match="is neither TorchScript, nor a state dict"):
        load_extractor(f"torch:{tmp_path}/evil.pkl")


def test_a_damaged_graph_is_refused(tmp_path):
    (tmp_path / "graph.pb").write_bytes(b"\x0a\xff\x01no graph")
    with pytest.raises(UserError, match="graph.pb is not a TensorFlow graph, or is damaged"):
        load_extractor(f"torch:{tmp_path}/graph.pb")
    with pytest.raises(UserError, match="missing.pb cannot be read"):
        load_extractor(f"torch:{tmp_path}/missing.pb")
