"""The evaluator and the extractors it looks through: files in, named numbers and refusals out."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import nn

from cm.errors import UserError
from cm.io.downloads import sha256
from evaluations.engine.readers import BatchFile, Statistics
from evaluations.engine.statistics_cache import KEPT, StatisticsCache
from evaluations.evaluator import evaluate, main, report
from evaluations.features import Features, TorchScriptExtractor, load_extractor, save_torchscript
from evaluations.features.torchscript import quiet_torchscript
from evaluations.features.trust import list_of_hashes
from evaluations.metrics import default_names
from evaluations.metrics.frechet import frechet_distance
from evaluations.metrics.inception_score import inception_score
from evaluations.metrics.kid import kid
from evaluations.metrics.precision_recall import precision_recall
from support.mpi import python

ROOT = Path(__file__).resolve().parents[2]
DIM, CLASSES = 6, 4
METRIC_NAMES = default_names()


class Features2(nn.Module):
    """Mean colours of a frame and a core, and logits of them."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.head = nn.Linear(DIM, CLASSES, bias=False)
        with th.no_grad():
            self.head.weight.copy_(th.randn(CLASSES, DIM, generator=th.Generator().manual_seed(seed)))

    def forward(self, images: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        x = images.float() / 64
        features = th.cat([x.mean((2, 3)), x[:, :, 1:3, 1:3].mean((2, 3))], 1)
        return features, self.head(features)


class Features3(Features2):
    def forward(self, images: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        x = images.float() / 64
        features = th.cat([x.mean((2, 3)), x[:, :, 1:3, 1:3].mean((2, 3))], 1)
        return features, self.head(features), x[:, :, :2, :2]


class OnlyFeatures(nn.Module):
    def forward(self, images: th.Tensor) -> th.Tensor:
        return images.float().mean((2, 3), keepdim=True)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reference and sample images, and extractor files."""
    folder = tmp_path_factory.mktemp("evaluator")
    rng = np.random.default_rng(0)
    ref = rng.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    sample = rng.integers(40, 256, (50, 4, 4, 3), dtype=np.uint8)
    np.savez(folder / "ref.npz", ref)
    np.savez(folder / "sample.npz", sample, rng.integers(0, CLASSES, 50))
    save_torchscript(Features2(), f"{folder}/two.ts", "tiny", "none")
    save_torchscript(Features3(), f"{folder}/three.ts", "tiny3", "none")
    save_torchscript(OnlyFeatures(), f"{folder}/one.ts", "colours", "none")
    return folder


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("CM_INCEPTION", raising=False)


def images_of(path):
    with np.load(path) as batch:
        return batch["arr_0"]


def run(folder, extractor="two.ts", ref="ref.npz", sample="sample.npz", **options):
    loaded = load_extractor(str(folder / extractor), trusted=True) if extractor else None
    return evaluate(folder / ref, folder / sample, loaded, **options)


def values(result):
    return {key: fields["value"] for key, fields in result["metrics"].items()}


def with_statistics(path, images=None, dim=DIM, **more):
    x = np.random.default_rng(dim).normal(size=(3 * dim, dim))
    arrays = {} if images is None else {"arr_0": images}
    np.savez(path, mu=x.mean(0), sigma=np.cov(x, rowvar=False), **arrays, **more)
    return x.mean(0), np.cov(x, rowvar=False)


def script(module, path):
    with quiet_torchscript():
        th.jit.save(th.jit.script(module), str(path))
    return TorchScriptExtractor(str(path), trusted=True)


# --- extractors ----------------------------------------------------------------------------------------------------


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


# --- numbers -------------------------------------------------------------------------------------------------------


def test_every_number_is_that_of_its_definition(folder):
    got = values(run(folder, "three.ts", metrics=(*METRIC_NAMES, "class_accuracy"), split_size=20, k=2, batch_size=7))
    extractor = load_extractor(f"{folder}/three.ts", trusted=True)
    ref, sample = (extractor.extract(images_of(folder / name)) for name in ("ref.npz", "sample.npz"))

    def plain_frechet(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))

    precision, recall = precision_recall(ref.pool, sample.pool, 2)
    with np.load(folder / "sample.npz") as batch:
        accuracy = (sample.logits.argmax(1) == batch["arr_1"]).mean()
    expected = {
        "inception_score": inception_score(sample.logits, 20),
        "frechet_distance": plain_frechet(ref.pool, sample.pool),
        "spatial_frechet_distance": plain_frechet(ref.spatial, sample.spatial),
        "precision": precision,
        "recall": recall,
        "kernel_distance": kid(ref.pool, sample.pool, subset_size=50).mean,
        "class_accuracy": accuracy,
    }
    assert got.keys() == expected.keys()
    # batches of 7 and of 60 may round the float32 network differently
    assert got == {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in expected.items()}
    assert expected["frechet_distance"] > 0.1


@pytest.fixture(scope="module")
def named(folder):
    """The samples with names for their classes, and a class of the extractor that no sample has."""
    with np.load(folder / "sample.npz") as batch:
        labels = np.minimum(batch["arr_1"], CLASSES - 2)
        np.savez(folder / "named.npz", batch["arr_0"], labels, class_names=np.array(["cat", "dog", "\x1bemu", "fox"]))
    return folder / "named.npz"


def test_class_accuracy_is_given_for_each_class_by_its_name(folder, named):
    result = run(folder, sample=named, metrics=["class_accuracy"], batch_size=7)
    with np.load(named) as batch:
        images, labels = batch["arr_0"], batch["arr_1"]
    taken = load_extractor(f"{folder}/two.ts", trusted=True).extract(images).logits.argmax(1)
    expected = {
        name: {"value": float((taken[labels == number] == number).mean()), "count": int((labels == number).sum())}
        for number, name in enumerate(("cat", "dog", "\x1bemu"))
    }
    assert result["metrics"]["class_accuracy"]["by_class"] == expected
    assert result["metrics"]["class_accuracy"]["value"] == pytest.approx((taken == labels).mean())
    lines = report(result).splitlines()
    worst = lines[1 + next(i for i, line in enumerate(lines) if line.startswith("Class accuracy"))]
    assert worst.startswith("  worst of 3 classes: ") and "\x1b" not in worst
    name, share = min(expected.items(), key=lambda item: item[1]["value"])
    first = worst.removeprefix("  worst of 3 classes: ").split(", ")[0]
    assert first.endswith(f"{share['value']:.1%} of {share['count']}") and name.strip("\x1b") in first


def test_classes_without_names_go_by_number(folder):
    by_class = run(folder, metrics=["class_accuracy"])["metrics"]["class_accuracy"]["by_class"]
    assert list(by_class) == [str(number) for number in range(CLASSES)]
    assert sum(share["count"] for share in by_class.values()) == 50


@pytest.mark.parametrize("names, message", [
    (["a", "a", "b", "c"], "class_names has a name twice"),
    (["a", "b"], "class_names has 2 names, and there are 3 classes"),
    ([0, 1, 2, 3], "class_names is no list of words"),
])
def test_class_names_that_cannot_be_are_refused(named, tmp_path, names, message):
    with np.load(named) as batch:
        np.savez(tmp_path / "odd.npz", batch["arr_0"], batch["arr_1"], class_names=np.array(names))
    with pytest.raises(UserError, match=rf"odd.npz: {message}; write the file again"):
        BatchFile(tmp_path / "odd.npz").class_names()


def test_equal_sets_are_at_no_distance(folder):
    got = values(run(folder, sample="ref.npz"))
    assert got["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert (got["precision"], got["recall"]) == (1, 1)


def test_stored_statistics_go_before_images(folder, tmp_path):
    mu, sigma = with_statistics(tmp_path / "ref.npz", images_of(folder / "ref.npz"))
    result = evaluate(tmp_path / "ref.npz", folder / "sample.npz", load_extractor(f"{folder}/two.ts", trusted=True))
    fields = result["metrics"]["frechet_distance"]
    extractor = load_extractor(f"{folder}/two.ts", trusted=True)
    sample = extractor.extract(images_of(folder / "sample.npz")).pool.astype(np.float64)
    expected = frechet_distance(mu, sigma, sample.mean(0), np.cov(sample, rowvar=False))
    assert fields["value"] == pytest.approx(expected, rel=1e-5)
    assert fields["reference_source"] == "stored statistics" and fields["reference_count"] is None
    assert fields["sample_source"] == "images" and fields["sample_count"] == 50
    assert result["metrics"]["precision"]["reference_count"] == 60                  # of the images


def test_two_files_of_statistics_need_no_extractor(tmp_path):
    ref = with_statistics(tmp_path / "ref.npz", dim=5, extractor="torchscript-a", num_images=99)
    sample = with_statistics(tmp_path / "sample.npz", dim=5)
    np.savez(tmp_path / "sample.npz", mu=sample[0] + 1, sigma=sample[1])
    result = evaluate(tmp_path / "ref.npz", tmp_path / "sample.npz")
    fields = result["metrics"].pop("frechet_distance")
    assert fields["value"] == pytest.approx(frechet_distance(*ref, sample[0] + 1, sample[1])) == pytest.approx(5)
    assert fields["label"] == "Frechet distance (torchscript-a features)"
    assert not result["metrics"] and set(result["skipped"]) == set(METRIC_NAMES) - {"fid"}
    assert "holds only statistics" in result["skipped"]["precision_recall"]


# --- names and provenance ------------------------------------------------------------------------------------------


class StandIn:
    """Anything with this call is an extractor."""

    id, name, resize, is_inception = "torchscript-0123", "Inception-v3", "bilinear to 299x299", True

    def extract(self, images):
        x = images.reshape(len(images), -1).astype(np.float32)
        return Features(x[:, :DIM], x[:, DIM : DIM + 3], x[:, :CLASSES])


def test_inception_has_the_famous_names(folder):
    lines = report(evaluate(folder / "ref.npz", folder / "sample.npz", StandIn())).splitlines()
    numbers = [line.split(": ")[0] for line in lines if "[samples: N=50" in line]
    assert numbers == ["Inception Score", "FID", "sFID", "Precision", "Recall", "KID"]
    assert next(line for line in lines if line.startswith("FID: ")).endswith(
        "[samples: N=50; reference: N=60; torchscript-0123, resize bilinear to 299x299]"
    )


def test_no_number_of_another_network_bears_inceptions_names(folder):
    lines = report(run(folder, "three.ts", metrics=(*METRIC_NAMES, "class_accuracy"))).splitlines()
    numbers = [line.split(": ")[0] for line in lines if "[samples: N=50" in line]
    assert len(numbers) == 7 and all(name.endswith("(tiny3 features, not Inception)") for name in numbers)
    assert not [name for name in numbers if "FID" in name or "KID" in name or "Inception Score" in name]
    assert "Frechet distance (tiny3 features, not Inception)" in numbers
    assert "tiny3" in lines[2] and "resize: none" in lines[2]


def test_unrecorded_features_are_not_called_fid(tmp_path):
    for name in ("ref.npz", "sample.npz"):
        with_statistics(tmp_path / name)
    text = report(evaluate(tmp_path / "ref.npz", tmp_path / "sample.npz"))
    assert "Frechet distance (the files do not say in which features): " in text
    assert "[samples: N not recorded, stored statistics; reference: N not recorded, stored statistics; " in text


def test_warnings_say_when_a_number_is_weak(folder, tmp_path):
    np.savez(tmp_path / "few.npz", np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8))
    result = run(folder, sample=tmp_path / "few.npz", metrics=["fid"])
    assert any("5 samples are fewer than the 6 feature dimensions" in text for text in result["warnings"])
    assert result["metrics"]["frechet_distance"]["clipped"] < 1e-6
    assert run(folder, metrics=["fid"])["warnings"] == []
    sigma = np.eye(DIM)
    sigma[:3, :3] = 1.9 * np.eye(3) - 0.9                   # each pair is possible, and not all three together
    np.savez(tmp_path / "damaged.npz", mu=np.zeros(DIM), sigma=sigma)
    warnings = run(folder, ref=tmp_path / "damaged.npz", metrics=["fid"])["warnings"]
    assert any("damaged" in text for text in warnings)


# --- the cache -----------------------------------------------------------------------------------------------------


class Counting(StandIn):
    def __init__(self, name="torch-0123"):
        self.id, self.images = name, 0

    def extract(self, images):
        self.images += len(images)
        return super().extract(images)


def test_statistics_are_computed_once_for_the_same_images_and_network(folder, tmp_path):
    cache = StatisticsCache(tmp_path / "cache")
    first, second, other = Counting(), Counting(), Counting("torch-4567")
    files = folder / "ref.npz", folder / "sample.npz"
    before = evaluate(*files, first, metrics=["fid", "sfid"], cache=cache)
    shutil.copy(files[0], tmp_path / "renamed.npz")         # the content counts, not the name
    after = evaluate(tmp_path / "renamed.npz", files[1], second, metrics=["fid", "sfid"], cache=cache)
    assert first.images == 2 + 60 + 50 and second.images == 2
    assert values(after) == values(before) == values(evaluate(*files, Counting(), metrics=["fid", "sfid"]))
    fields = after["metrics"]["frechet_distance"]
    assert (fields["reference_source"], fields["sample_source"]) == ("cached statistics",) * 2
    assert (fields["reference_count"], fields["sample_count"]) == (60, 50)
    assert "samples: N=50, cached statistics; reference: N=60, cached statistics; torch-0123" in report(after)
    evaluate(*files, other, metrics=["fid"], cache=cache)
    assert other.images == 2 + 60 + 50                      # another network
    np.savez(tmp_path / "changed.npz", np.roll(images_of(files[0]), 1, 0))
    evaluate(tmp_path / "changed.npz", files[1], second, metrics=["fid"], cache=cache)
    assert second.images == 2 + 2 + 60                      # other content


def test_a_cache_that_cannot_be_used_costs_only_time(folder, tmp_path):
    cache = StatisticsCache(tmp_path / "cache")
    files = folder / "ref.npz", folder / "sample.npz"
    expected = values(evaluate(*files, Counting(), metrics=["fid"], cache=cache))
    entries = sorted((tmp_path / "cache").iterdir())
    assert len(entries) == 2
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:200])         # half a file, by somebody else's fault
    damaged = Counting()
    assert values(evaluate(*files, damaged, metrics=["fid"], cache=cache)) == expected and damaged.images > 100
    (tmp_path / "file").write_text("no folder")
    assert values(evaluate(*files, Counting(), metrics=["fid"], cache=StatisticsCache(tmp_path / "file"))) == expected


def test_the_cache_forgets_what_was_not_used_for_longest(tmp_path):
    cache = StatisticsCache(tmp_path)
    np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "images.npz").rename(tmp_path / "images")   # not an entry
    np.savez(tmp_path / "samples.npz", np.zeros(3))         # the user's own, and the oldest
    os.utime(tmp_path / "samples.npz", (0, 0))
    statistics = Statistics(np.zeros(2), np.eye(2), "torch-0", 2)
    for number in range(KEPT + 3):
        cache.save(str(tmp_path / "images"), statistics, choice=str(number))
        for entry in tmp_path.glob(f"*-{number}-torch-0.npz"):
            os.utime(entry, (number, number))
        assert number > 3 or cache.load(str(tmp_path / "images"), "torch-0", choice="0").num_images == 2
    (tmp_path / "samples.npz").unlink()                     # still there
    left = {int(entry.name.split("-")[1]) for entry in tmp_path.glob("*.npz")}
    assert left == {0, *range(4, KEPT + 3)}                 # the first was read in between


def test_the_command_keeps_statistics_unless_told_not_to(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [str(folder / "ref.npz"), str(folder / "sample.npz"), "--inception", str(folder / "two.ts"),
          "--trust_extractor",
               "--metrics", "fid"]
    main([*command, "--cache", "off"])
    assert not list(tmp_path.rglob("*.npz"))
    main([*command, "--cache", str(tmp_path / "mine")])
    main(command)
    kept = [list(place.glob("*.npz")) for place in (tmp_path / "mine", tmp_path / "consistency-toolkit/statistics")]
    assert [len(each) for each in kept] == [2, 2]


# --- refusals ------------------------------------------------------------------------------------------------------


def test_metrics_that_cannot_be_had_are_left_out_or_refused(folder, tmp_path):
    assert run(folder)["skipped"] == {"sfid": "tiny gives no spatial features"}
    assert set(run(folder, "one.ts")["skipped"]) == {"sfid", "inception_score"}
    with pytest.raises(UserError, match="sfid cannot be computed: tiny gives no spatial features"):
        run(folder, metrics=["fid", "sfid"])
    with pytest.raises(UserError, match="class_accuracy cannot be computed: colours gives no logits"):
        run(folder, "one.ts", metrics=["class_accuracy"])
    with pytest.raises(UserError, match="class_accuracy .* class labels"):
        run(folder, sample="ref.npz", metrics=[*METRIC_NAMES, "class_accuracy"])
    with pytest.raises(UserError, match="unknown metric 'fids'.*Did you mean 'fid'"):
        run(folder, metrics=["fids"])
    with pytest.raises(UserError, match="precision_recall .* more than 50 images"):
        run(folder, metrics=["precision_recall"], k=50)
    with_statistics(tmp_path / "ref.npz")
    with pytest.raises(UserError, match="precision_recall .* needs images .*ref.npz holds only statistics"):
        run(folder, ref=tmp_path / "ref.npz", metrics=["precision_recall"])


class Nan(nn.Module):
    def forward(self, images: th.Tensor) -> th.Tensor:
        x = images.float().mean((2, 3))
        return th.where(x == 255, float("nan"), x)


@pytest.mark.parametrize("arrays, message", [
    ({"arr_0": np.array([{}, {}])}, "holds pickled Python objects, which are never loaded"),
    ({"arr_0": np.zeros((9, 4, 4, 3))}, "are float64, but must be uint8"),
    ({"arr_0": np.zeros((9, 3, 4, 4), np.uint8)}, "are NCHW, but must be NHWC"),
    ({"arr_0": np.zeros((9, 5, 5, 3), np.uint8)}, "different sizes .*(4x4, .*bad.npz 5x5|bad.npz 5x5, .*4x4)"),
    ({"arr_0": np.zeros((1, 4, 4, 3), np.uint8)}, "bad.npz has 1 image; sets of images are compared, of at least 2"),
    ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "are empty"),
    ({"images": np.zeros((9, 4, 4, 3), np.uint8)}, r"has neither images \(arr_0\) nor statistics .*; it has: images"),
    ({"arr_0": np.full((9, 4, 4, 3), 255, np.uint8)}, "bad.npz: the pool features of image 0 are not finite"),
])
def test_bad_images_are_one_clear_error_each(folder, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    save_torchscript(Nan(), f"{tmp_path}/nan.ts", "nan", "none")
    for ref, sample in (("ref.npz", tmp_path / "bad.npz"), (tmp_path / "bad.npz", "sample.npz")):
        with pytest.raises(UserError, match=message):
            run(folder, tmp_path / "nan.ts", ref, sample)


def test_statistics_serve_images_of_another_size(folder, tmp_path):
    np.savez(tmp_path / "large.npz", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    with_statistics(tmp_path / "ref.npz", images_of(folder / "ref.npz"))
    assert "frechet_distance" in values(run(folder, ref=tmp_path / "ref.npz", sample=tmp_path / "large.npz",
                                            metrics=["fid"]))
    with pytest.raises(UserError, match="different sizes"):
        run(folder, ref=tmp_path / "ref.npz", sample=tmp_path / "large.npz")


def test_labels_of_more_classes_than_the_extractors_are_refused(folder, tmp_path):
    np.savez(tmp_path / "sample.npz", images_of(folder / "sample.npz"), np.full(50, CLASSES))
    with pytest.raises(UserError, match="labels 4 to 4, but tiny has 4 classes"):
        run(folder, sample=tmp_path / "sample.npz", metrics=["class_accuracy"])


def test_features_of_two_networks_are_never_compared(folder, tmp_path):
    ref, sample = tmp_path / "ref.npz", tmp_path / "sample.npz"
    with_statistics(ref, extractor="torchscript-a")
    with_statistics(sample, extractor="torchscript-b")
    with pytest.raises(UserError, match="torchscript-a, stored in the file; .*torchscript-b, stored in the file"):
        evaluate(ref, sample)
    with pytest.raises(UserError, match="torchscript-a, stored in the file; .*torchscript-.*, computed now"):
        run(folder, ref=ref)
    with_statistics(ref, dim=2048 // 64)
    with pytest.raises(UserError, match="32 features of an extractor it does not name.*6 features of torchscript-"):
        run(folder, ref=ref)


# --- memory --------------------------------------------------------------------------------------------------------


def peak_bytes(folder, count, metrics):
    """Largest memory of an evaluation of `count` samples; all of its numbers are numpy's."""
    rng = np.random.default_rng(1)
    if not (folder / f"{count}.npz").exists():
        np.savez(folder / f"{count}.npz", rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))
    np.savez(folder / "ref16.npz", rng.integers(0, 256, (500, 16, 16, 3), dtype=np.uint8))
    tracemalloc.start()
    evaluate(folder / "ref16.npz", folder / f"{count}.npz", Wide(), metrics=metrics)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


class Wide(StandIn):
    def extract(self, images):
        x = images.reshape(len(images), -1).astype(np.float32)
        return Features(x[:, :256], x[:, 256:384], x[:, :CLASSES])


def test_memory_grows_by_the_points_of_precision_and_recall_alone(tmp_path):
    few, many = 1000, 5000
    images = 16 * 16 * 3
    sums = ["inception_score", "fid", "sfid"]
    peak_bytes(tmp_path, few, sums)                         # what is imported late is not counted
    growth = peak_bytes(tmp_path, many, sums) - peak_bytes(tmp_path, few, sums)
    assert growth < 0.02 * (many - few) * images            # the images alone would be 3 MB
    all_growth = peak_bytes(tmp_path, many, [*sums, "kid"]) - peak_bytes(tmp_path, few, [*sums, "kid"])
    assert all_growth < 1.1 * (many - few) * 256 * 4
    # blocks of 2048 x (2048 + 256) distances, in place of 500 x 500 and 1000 x 500 in the smaller set
    block_growth = peak_bytes(tmp_path, many, ["precision_recall"]) - peak_bytes(tmp_path, few, ["precision_recall"])
    assert block_growth < 1.1 * ((many - few) * 256 * 4 + 2 * 2048 * (2048 + 256) * 4)


def test_the_benchmark_counts_memory(tmp_path):
    """A small run of what measures 50,000 images."""
    done = python(["benchmarks/evaluator_memory.py", "--num", "600", "--ref_num", "300", "--size", "16", "--dim", "64",
                   "--spatial_dim", "32", "--classes", "10", "--metrics", "fid,sfid,inception_score,precision_recall"])
    assert done.rc == 0, done
    line = done.stdout.splitlines()[-1]
    assert line.startswith("600 samples and 300 reference images of 16x16, 64 features, frechet_distance, ")
    assert 0 <= float(line.split(": ")[1].split()[0]) < 0.2


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_json(folder, tmp_path, capsys):
    out = tmp_path / "new" / "metrics.json"
    main([str(folder / "ref.npz"), str(folder / "sample.npz"), "--inception", str(folder / "two.ts"),
          "--trust_extractor",
          "--metrics", "fid, kid", "--class_accuracy", "--json", str(out), "--batch_size", "16"])
    written = json.loads(out.read_text())
    printed = capsys.readouterr()
    assert list(written["metrics"]) == ["frechet_distance", "kernel_distance", "class_accuracy"]
    assert written["metrics"]["frechet_distance"]["value"] == pytest.approx(
        values(run(folder, metrics=["fid"]))["frechet_distance"], rel=1e-5
    )
    assert report(written) in printed.out and "50 of 50" in printed.err and "img/s" in printed.err
    assert written["extractor"]["name"] == "tiny" and written["settings"]["kid_subset_size"] == 50


def test_bad_input_is_one_line_and_status_2(folder):
    command = [sys.executable, "evaluations/evaluator.py", str(folder / "ref.npz"), str(folder / "missing.npz")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {folder / 'missing.npz'} does not exist"
    assert done.stdout == ""


@pytest.mark.parametrize("flags, message", [
    (["--k", "0"], "0 must be at least 1"),
    (["--inceptio", "x"], "Did you mean --inception"),
    (["--metric", "fid"], "unrecognized arguments"),
])
def test_wrong_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["ref.npz", "sample.npz", *flags])
    assert leaving.value.code == 2 and message in capsys.readouterr().err
