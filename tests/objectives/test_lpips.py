"""LPIPS through piq: against the formula, against piq's own class, and every way its files can be missing or broken.

The weights are random stand-ins of the right names and shapes.
"""

import csv
import importlib.util
import pickle
import sys
import urllib.error
from pathlib import Path

import pytest
import torch as th
import torch.nn.functional as F

from cm.errors import UserError
from cm.logging import logger
from cm.objectives import distances, lpips
from cm.objectives.distances import DISTANCES
from cm.objectives.lpips import LPIPS_WEIGHTS, VGG_WEIGHTS, lpips_network, prepare_lpips

ROOT = Path(__file__).resolve().parents[2]
CPU, F64 = th.device("cpu"), th.float64
GROUPS = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]      # VGG-16's convolutions, by their numbers
CHANNELS = [64, 128, 256, 512, 512]


def stand_in_vgg() -> dict[str, th.Tensor]:
    rng = th.Generator().manual_seed(0)
    state, width = {}, 3
    for group, channels in zip(GROUPS, CHANNELS):
        for number in group:
            scale = (2 / (9 * width)) ** 0.5                                 # keeps activations at size 1
            state[f"features.{number}.weight"] = scale * th.randn(channels, width, 3, 3, generator=rng)
            state[f"features.{number}.bias"] = 0.1 * th.randn(channels, generator=rng)
            width = channels
    for number in (0, 3, 6):                                                 # half a gigabyte in the published file
        state |= {f"classifier.{number}.weight": th.zeros(2, 2), f"classifier.{number}.bias": th.zeros(2)}
    return state


def stand_in_lpips() -> list[th.Tensor]:
    rng = th.Generator().manual_seed(1)
    return [th.rand(1, channels, 1, 1, generator=rng) for channels in CHANNELS]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    th.save(stand_in_vgg(), folder / VGG_WEIGHTS.name)
    th.save(stand_in_lpips(), folder / LPIPS_WEIGHTS.name)
    return folder


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    """torch.hub's folder for files of weights, empty, and a machine without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    lpips_network.cache_clear()
    yield tmp_path / "torch" / "hub" / "checkpoints"
    lpips_network.cache_clear()


@pytest.fixture
def installed(checkpoints, stand_ins) -> Path:
    """The same folder with both files in it."""
    checkpoints.mkdir(parents=True)
    for file in stand_ins.iterdir():
        (checkpoints / file.name).symlink_to(file)
    return checkpoints


def no_network(*args, **kwargs):
    raise urllib.error.URLError("Name or service not known")


def formula(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    """LPIPS of images in [0,1], written down from the definition: [N]."""
    vgg, weights = stand_in_vgg(), stand_in_lpips()
    # piq keeps these in float32, which float64 sees.
    mean, std = (th.tensor(v).to(a.dtype).reshape(1, 3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))
    a, b = (a - mean) / std, (b - mean) / std
    total = 0
    for level, group in enumerate(GROUPS):
        unit = []
        for x in (a, b):
            x = F.avg_pool2d(x, 2) if level else x
            for number in group:
                kernel, bias = (vgg[f"features.{number}.{part}"].to(x.dtype) for part in ("weight", "bias"))
                x = F.conv2d(x, kernel, bias, padding=1).relu()
            unit.append((x, x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)))
        (a, unit_a), (b, unit_b) = unit
        total = total + (weights[level].to(a.dtype) * (unit_a - unit_b).square()).sum(1).mean((1, 2))
    return total


def images(side: int, n: int = 2, dtype: th.dtype = F64) -> tuple[th.Tensor, th.Tensor]:
    rng = th.Generator().manual_seed(side)
    return tuple(th.rand(n, 3, side, side, generator=rng, dtype=F64).to(dtype) for _ in "ab")


# --- values ----------------------------------------------------------------------------------------------------------


def test_value_and_gradient_are_the_formula(installed):
    a, b = images(32)
    a.requires_grad_(True)
    value, expected = lpips_network(CPU, F64)(a, b), formula(a, b)
    assert value.shape == (2,) and (value > 0.01).all()
    th.testing.assert_close(value, expected, rtol=1e-11, atol=0)             # float64, sums of 1e5 products
    (gradient,) = th.autograd.grad(value.sum(), a)
    (expected_gradient,) = th.autograd.grad(expected.sum(), a)
    assert gradient.abs().max() > 1e-5
    th.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-14)


def test_it_is_the_lpips_of_piq(installed):
    a, b = images(32, dtype=th.float32)
    network = lpips_network(CPU)
    from piq import LPIPS

    whole = th.load(installed / VGG_WEIGHTS.name)                            # piq wants the classifier in its true size
    for number, shape in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items():
        whole[f"classifier.{number}.weight"] = th.zeros(1).expand(shape)     # saved as one number each
        whole[f"classifier.{number}.bias"] = th.zeros(1).expand(shape[0])
    (installed / VGG_WEIGHTS.name).unlink()
    th.save(whole, installed / VGG_WEIGHTS.name)
    with pytest.warns(UserWarning):                                          # it says that `pretrained` is out of date
        original = LPIPS(replace_pooling=True, reduction="none")
    assert th.equal(network(a, b), original(a, b))


def test_under_autocast_it_is_the_same_number(monkeypatch):
    """Of images that differ by less than bfloat16 resolves, as neighbours on a grid of noise levels do."""
    monkeypatch.setattr(distances, "lpips_network", lambda device, dtype: network)
    kernel = th.randn(8, 3, 3, 3, generator=th.Generator().manual_seed(0))

    def network(a, b):
        return (F.conv2d(a, kernel) - F.conv2d(b, kernel)).square().mean((1, 2, 3))

    a = images(256, dtype=th.float32)[0].requires_grad_(True)
    b = a.detach() + 1e-3 * th.ones_like(a)
    plain = distances.lpips(a, b)
    with th.autocast("cpu", dtype=th.bfloat16):
        cast = distances.lpips(a, b)
    assert th.equal(cast, plain)
    assert th.equal(*(th.autograd.grad(value.sum(), a)[0] for value in (cast, plain)))


@pytest.mark.parametrize("side, seen", [(8, 224), (64, 224), (256, 256)])
def test_the_distance_enlarges_small_images_and_shifts_their_range(monkeypatch, side, seen):
    given = []
    monkeypatch.setattr(distances, "lpips_network", lambda device, dtype: lambda a, b: given.append((a, b)))
    a, b = (2 * x - 1 for x in images(side))
    distances.lpips(a, b)
    for mine, theirs in zip((a, b), given[0]):
        assert theirs.shape == (2, 3, seen, seen) and theirs.dtype == F64
        whole = mine if seen == side else F.interpolate(mine, size=seen, mode="bilinear", align_corners=False)
        th.testing.assert_close(theirs, (whole + 1) / 2)


def test_it_sees_grey_as_rgb_and_no_latents(monkeypatch):
    given = []
    monkeypatch.setattr(distances, "lpips_network", lambda device, dtype: lambda a, b: given.append((a, b)))
    a, b = images(256)
    distances.lpips(a[:, :1], b[:, :1])
    assert th.equal(given[0][0], ((a[:, :1] + 1) / 2).expand(-1, 3, -1, -1))
    with pytest.raises(UserError, match="not latents of 4 channels; choose another --loss_norm"):
        distances.lpips(*(th.cat([x, x[:, :1]], 1) for x in (a, b)))


def test_the_network_is_frozen_and_built_once_per_type(installed):
    a, b = images(32, dtype=th.float32)
    network = lpips_network(CPU, th.float32)
    before = network(a, b)
    assert not network.training and not any(param.requires_grad for param in network.parameters())
    rough = lpips_network(CPU, th.bfloat16)(a.bfloat16(), b.bfloat16())
    th.testing.assert_close(rough.float(), before, rtol=0.1, atol=0)         # bf16 has 3 digits
    assert lpips_network(CPU, th.float32) is network
    assert th.equal(network(a, b), before)                                   # and is not rounded to bf16 for good


def test_a_file_with_the_convolutions_alone_is_enough(installed, stand_ins):
    path = installed / VGG_WEIGHTS.name
    state = {name: tensor for name, tensor in th.load(path).items() if name.startswith("features")}
    path.unlink()
    th.save(state, path)
    a, b = images(32)
    th.testing.assert_close(lpips_network(CPU, F64)(a, b), formula(a, b), rtol=1e-11, atol=0)


def test_one_step_of_consistency_training(installed, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("cm_train", ROOT / "scripts" / "cm_train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = {
        "training_mode": "consistency_training", "loss_norm": "lpips", "data_dir": "digits", "image_size": 8,
        "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "", "num_workers": 0,
        "global_batch_size": 1, "total_training_steps": 1, "start_scales": 4, "weight_schedule": "uniform",
        "log_interval": 1, "log_dir": tmp_path / "run",
    }
    monkeypatch.setattr(sys, "argv", ["cm_train.py", *(str(word) for flag in flags.items() for word in flag_of(*flag))])
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv")
    try:
        script.main(script.read_flags())
    finally:
        logger.reset()
    with open(tmp_path / "run" / "progress.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["loss"]) > 0 and float(row["grad_norm"]) > 0


def flag_of(name, value):
    return f"--{name}", value


# --- files and packages ----------------------------------------------------------------------------------------------


def test_offline_says_which_files_to_put_where(checkpoints):
    with pytest.raises(UserError) as caught:
        lpips_network(CPU)
    message = str(caught.value)
    for file in (LPIPS_WEIGHTS, VGG_WEIGHTS):
        assert f"{file.url} -> {checkpoints / file.name}" in message
    assert "Name or service not known" in message and "--loss_norm" in message
    assert list(checkpoints.iterdir()) == []


def test_both_files_are_downloaded_once(checkpoints, stand_ins, monkeypatch):
    monkeypatch.undo()                                                       # the network is back, for file:// too
    monkeypatch.setenv("TORCH_HOME", str(checkpoints.parents[1]))
    here = [file._replace(url=(stand_ins / file.name).as_uri(), sha256_prefix=None) for file in lpips.WEIGHT_FILES]
    monkeypatch.setattr(lpips, "WEIGHT_FILES", here)
    prepare_lpips()
    for file in here:
        assert (checkpoints / file.name).read_bytes() == (stand_ins / file.name).read_bytes()
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    prepare_lpips()                                                          # nothing is left to download

    (checkpoints / VGG_WEIGHTS.name).unlink()
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(checkpoints.parents[1]))
    monkeypatch.setattr(lpips, "WEIGHT_FILES", [here[1]._replace(sha256_prefix="0000")])
    with pytest.raises(UserError, match="invalid hash"):                     # of a download that is not the file
        prepare_lpips()
    assert not (checkpoints / VGG_WEIGHTS.name).exists()


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


BROKEN = {
    "truncated VGG": (VGG_WEIGHTS, lambda path, whole: path.write_bytes(whole.read_bytes()[:100_000])),
    "truncated LPIPS": (LPIPS_WEIGHTS, lambda path, whole: path.write_bytes(whole.read_bytes()[:3000])),
    "empty": (VGG_WEIGHTS, lambda path, whole: path.write_bytes(b"")),
    "a web page": (VGG_WEIGHTS, lambda path, whole: path.write_text("<html>Please log in</html>")),
    "another network": (VGG_WEIGHTS, lambda path, whole: th.save({"conv.weight": th.zeros(1)}, path)),
    "other shapes": (
        VGG_WEIGHTS, lambda path, whole: th.save({name: th.zeros(3) for name in th.load(whole)}, path)
    ),
    "other layers": (LPIPS_WEIGHTS, lambda path, whole: th.save([th.zeros(1, 64, 1, 1)], path)),
    "code": (LPIPS_WEIGHTS, lambda path, whole: path.write_bytes(pickle.dumps(Bomb(), 2))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(installed, stand_ins, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file, spoil = BROKEN[name]
    path = installed / file.name
    path.unlink()
    spoil(path, stand_ins / file.name)
    with pytest.raises(UserError) as caught:
        lpips_network(CPU)
    assert str(path) in str(caught.value) and "Delete the file" in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("package", ["piq", "torchvision"])
def test_without_the_packages(checkpoints, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)                          # importing it now fails
    with pytest.raises(UserError, match="pip install piq torchvision.*--loss_norm"):
        prepare_lpips()


def test_the_other_distances_are_named():
    assert ", ".join(name for name in DISTANCES if name != "lpips") in lpips.OTHERWISE
