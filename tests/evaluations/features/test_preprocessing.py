"""Networks of torchvision's kind, with a description of their resize and normalisation next to the file."""

import json

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from cm.errors import UserError
from evaluations.features import EXTRACTORS, Features, load_extractor
from evaluations.features.torchscript import quiet_torchscript

DESCRIPTION = {"name": "small net", "resize": {"side": 12, "mode": "bicubic", "antialias": True}, "range": [0, 1],
               "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.conv(x).relu().mean((2, 3))


@pytest.fixture(scope="module")
def net():
    th.manual_seed(0)
    return Net().eval()


@pytest.fixture
def path(net, tmp_path):
    with quiet_torchscript():
        th.jit.script(net).save(str(tmp_path / "net.ts"))
    return tmp_path / "net.ts"


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)


def describe(path, **changes):
    path.with_name("net.ts.json").write_text(json.dumps(DESCRIPTION | changes))
    return load_extractor(str(path), trusted=True)


def by_hand(net, images, **resize):
    x = th.from_numpy(images).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (12, 12), **resize) / 255
    mean, std = (th.tensor(DESCRIPTION[key]).view(3, 1, 1) for key in ("mean", "std"))
    with th.no_grad():
        return net((x - mean) / std).numpy()


@pytest.mark.parametrize("rule, options, text", [
    ({"mode": "bicubic", "antialias": True}, {"mode": "bicubic", "antialias": True}, "bicubic to 12x12, antialiased"),
    ({"mode": "bilinear", "antialias": False}, {"mode": "bilinear"}, "bilinear to 12x12, not antialiased"),
    ({"mode": "area"}, {"mode": "area"}, "area to 12x12"),
])
def test_features_are_those_of_the_same_steps_by_hand(net, path, images, rule, options, text):
    extractor = describe(path, resize={"side": 12, **rule})
    np.testing.assert_allclose(extractor.extract(images).pool, by_hand(net, images, **options), rtol=1e-5, atol=1e-6)
    assert (extractor.name, extractor.resize, extractor.is_inception) == ("small net", text, False)


def test_without_a_resize_images_stay_and_the_range_may_be_signed(net, path, images):
    path.with_name("net.ts.json").write_text(json.dumps({"range": [-1, 1]}))
    x = th.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    extractor = load_extractor(str(path), trusted=True)
    with th.no_grad():
        np.testing.assert_allclose(extractor.extract(images).pool, net(x).numpy(), rtol=1e-5, atol=1e-6)
    assert extractor.resize == "none" and extractor.name == "net"


def test_the_identity_is_of_the_network_and_the_description(path):
    ids = [describe(path).id, describe(path, name="other").id, describe(path, mean=[0, 0, 0]).id,
           describe(path, resize={"side": 12, "mode": "bicubic", "antialias": False}).id]
    path.with_name("net.ts.json").unlink()
    ids.append(load_extractor(str(path), trusted=True).id)
    assert ids[0] == ids[1] and len(set(ids[1:])) == 4 and all(each.startswith("torchscript-") for each in ids)


def test_a_network_that_takes_floats_asks_for_a_description(path, images):
    with pytest.raises(UserError, match="failed on uint8 images .*describe them in .*net.ts.json"):
        load_extractor(str(path), trusted=True).extract(images)


@pytest.mark.parametrize("changes, message", [
    ({"resize": {"side": 0, "mode": "area"}}, "resize.side is 0, but must be a number of pixels from 1 to 4096"),
    ({"resize": {"side": 8, "mode": "lanczos"}}, "resize.mode is .?lanczos.?, but must be one of bilinear, "),
    ({"resize": {"side": 8, "mode": "bicubic"}}, "resize.antialias is None, but must be true or false"),
    ({"resize": {"side": 8, "mode": "area", "antialias": True}}, ".*left out with the mode area"),
    ({"resize": {"side": 8, "mode": "area", "crop": 1}}, "resize has the unknown key .?crop.?; the keys are side"),
    ({"resize": 224}, "resize is 224, but must be an object with the keys side, mode, antialias"),
    ({"mean": [0.5]}, "mean is .*, but must be a list of 3 finite numbers"),
    ({"std": [1, 0, 1]}, "std is .*, but must be three numbers above 0"),
    ({"range": [1, 0]}, "range is .*, but must be .*low below high"),
    ({"name": 3}, "name is 3, but must be a text"),
    ({"means": [0, 0, 0]}, "the file has the unknown key .?means.?"),
])
def test_a_wrong_description_is_refused_with_what_may_stand(path, changes, message):
    with pytest.raises(UserError, match=f"net.ts.json: {message}"):
        describe(path, **changes)


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[]", "must be an object"), ("{}", "says nothing")])
def test_what_is_no_description_is_refused(path, text, message):
    path.with_name("net.ts.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_extractor(str(path), trusted=True)


def test_a_kind_of_extractor_is_a_line_in_the_table(path, images, monkeypatch):
    class Mean:
        id, name, resize, is_inception = "mean-0", "mean", "none", False

        def __init__(self, path, device):
            self.path = path

        @staticmethod
        def recognizes(path):
            return path.endswith(".mean")

        def extract(self, images):
            return Features(images.astype(np.float32).mean((1, 2)), None, None)

    monkeypatch.setitem(EXTRACTORS, "mean", Mean)
    assert load_extractor(f"mean:{path}").extract(images).pool.shape == (4, 3)
    with pytest.raises(UserError, match="kinds: tf, torch, torchscript, mean"):
        load_extractor("meen")
