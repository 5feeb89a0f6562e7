"""TorchScript modules as extractors: what they may return, their identity, and what is refused."""

import numpy as np
import pytest
import torch as th
from torch import nn

from cm.errors import UserError
from cm.io.downloads import sha256
from evaluations.features import TorchScriptExtractor, load_extractor
from evaluations.features.torchscript import quiet_torchscript
from evaluations.features.trust import list_of_hashes
from support.tiny_evaluation import CLASSES, Features2, OnlyFeatures, folder, images_of, no_environment, run, values

__all__ = ["folder", "no_environment"]                     # fixtures


class AsDict(nn.Module):
    def forward(self, images: th.Tensor) -> dict[str, th.Tensor]:
        return {"features": images.float().mean((2, 3)), "spatial": images.float()[:, 0]}


class Misnamed(nn.Module):
    def forward(self, images: th.Tensor) -> dict[str, th.Tensor]:
        return {"fetures": images.float().mean((2, 3))}


class Integers(nn.Module):
    def forward(self, images: th.Tensor) -> th.Tensor:
        return images[:, :, 0, 0]


class WantsFloats(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, images: th.Tensor) -> th.Tensor:
        return self.conv(images).mean((2, 3))


class LikePublished(nn.Module):
    """Called as the published TorchScript Inception is: probabilities, or features on request."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.output = nn.Linear(width, classes)
        self.width = width

    def forward(self, img: th.Tensor, return_features: bool = False) -> th.Tensor:
        features = img.float().mean((1, 2, 3))[:, None].repeat(1, self.width) / 255
        return features if return_features else self.output(features).softmax(1)


def script(module, path):
    with quiet_torchscript():
        th.jit.save(th.jit.script(module), str(path))
    return TorchScriptExtractor(str(path), trusted=True)


def test_an_extractor_gives_what_the_module_returns(folder):
    images = images_of(folder / "ref.npz")
    features = load_extractor(f"torchscript:{folder}/three.ts", trusted=True).extract(images)
    x = images.astype(np.float64) / 64
    np.testing.assert_allclose(features.pool[:, :3], x.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(features.pool[:, 3:], x[:, 1:3, 1:3].mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(features.spatial, x[:, :2, :2].transpose(0, 3, 1, 2).reshape(60, -1), rtol=1e-6)
    assert features.logits.shape == (60, CLASSES)
    assert all(array.dtype == np.float32 for array in features)


def test_a_tensor_or_a_dict_will_do(tmp_path):
    images = np.full((2, 4, 4, 3), 7, np.uint8)
    alone = script(OnlyFeatures(), tmp_path / "a.ts").extract(images)
    named = script(AsDict(), tmp_path / "b.ts").extract(images)
    assert alone.pool.shape == (2, 3) and alone.spatial is None and alone.logits is None
    assert named.pool.shape == (2, 3) and named.spatial.shape == (2, 16) and named.logits is None


def test_the_published_calling_convention_is_understood(tmp_path):
    module = LikePublished(1008, 2048)
    extractor = script(module, tmp_path / "inception-2015-12-05.pt")
    images = np.full((2, 4, 4, 3), 51, np.uint8)
    features = extractor.extract(images)
    assert extractor.is_inception and extractor.name == "Inception-v3"
    np.testing.assert_allclose(features.pool, np.full((2, 2048), 0.2), rtol=1e-5)
    no_bias = 0.2 * module.output.weight.detach().sum(1).numpy()
    np.testing.assert_allclose(features.logits, np.stack([no_bias] * 2), atol=1e-5)
    assert not script(LikePublished(10, 4), tmp_path / "small.pt").is_inception


def test_features_are_float32_whatever_the_loop_around_computes_in(tmp_path):
    """A training loop may sample in bfloat16; the network that judges the samples must not."""
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 4)

        def forward(self, images: th.Tensor) -> th.Tensor:
            return self.conv(images.float()).flatten(1)

    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    extractor = script(Conv(), tmp_path / "conv.ts")
    alone = extractor.extract(images).pool
    with th.autocast("cpu", dtype=th.bfloat16):
        np.testing.assert_array_equal(extractor.extract(images).pool, alone)


def test_identity_is_of_the_weights_not_of_the_file(tmp_path):
    first = script(Features2(0), tmp_path / "a.ts")
    again = script(Features2(0), tmp_path / "renamed.ts")
    other = script(Features2(1), tmp_path / "c.ts")
    assert first.id == again.id != other.id
    assert first.id.startswith("torchscript-") and first.name == "a"
    assert script(OnlyFeatures(), tmp_path / "d.ts").id != script(AsDict(), tmp_path / "e.ts").id   # no weights at all


@pytest.mark.parametrize("module, message", [
    (Misnamed(), "returned a dict of fetures; an extractor returns"),
    (Integers(), "type torch.uint8 for 2 images"),
    (WantsFloats(), r"failed on uint8 images \(2, 3, 4, 4\)"),
])
def test_modules_that_are_no_extractors_are_refused(tmp_path, module, message):
    with pytest.raises(UserError, match=message):
        script(module, tmp_path / "m.ts").extract(np.zeros((2, 4, 4, 3), np.uint8))


@pytest.mark.parametrize("text, message", [
    ("{", "extractor.json is not JSON"), ("[" * 100_000, "nested too deeply"), ('["tiny"]', "names and texts"),
    ('{"name": {"a": 1}}', "names and texts"),
])
def test_descriptions_inside_a_file_are_data(folder, tmp_path, text, message):
    """What a stranger wrote into the archive beside the module."""
    path = tmp_path / "odd.ts"
    with quiet_torchscript():
        th.jit.save(th.jit.load(f"{folder}/two.ts"), str(path), _extra_files={"extractor.json": text})
    with pytest.raises(UserError, match=message):
        load_extractor(str(path), "cpu", trusted=True)


def test_files_that_are_no_extractors_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match="does not exist"):
        load_extractor(str(tmp_path / "missing.ts"))
    with pytest.raises(UserError, match="does not exist or is no file"):
        load_extractor(str(tmp_path))
    th.save({"weight": th.zeros(2)}, tmp_path / "state.pt")
    for wrong in (tmp_path / "state.pt", folder / "ref.npz"):
        with pytest.raises(UserError, match="TorchScript"):
            load_extractor(str(wrong))
        with pytest.raises(UserError, match="is not a TorchScript file"):
            load_extractor(f"torchscript:{wrong}")
    with pytest.raises(UserError, match="unknown kind of extractor 'tourchscript'.*Did you mean 'torchscript'"):
        load_extractor(f"tourchscript:{folder}/two.ts")
    with pytest.raises(UserError, match="the feature extractor torchscript does not exist.*PATH, KIND:PATH"):
        load_extractor("torchscript")


def test_the_environment_names_the_extractor(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CM_INCEPTION", f"{folder}/two.ts")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    list_of_hashes().parent.mkdir()
    list_of_hashes().write_text(sha256(folder / "two.ts"))
    assert load_extractor().name == "tiny"
    assert values(run(folder, extractor=None, metrics=["fid"])) == values(run(folder, metrics=["fid"]))
