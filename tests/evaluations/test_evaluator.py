"""The evaluator: files in, named numbers and refusals out."""

import contextlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import nn

from cm.errors import UserError
from evaluations.engine.readers import BatchFile
from evaluations.evaluator import evaluate, main, report
from evaluations.features import Features, load_extractor, save_torchscript
from evaluations.flags import asked_metrics, evaluator_parser
from evaluations.metrics import default_names
from evaluations.metrics.frechet import frechet_distance
from evaluations.metrics.inception_score import inception_score
from evaluations.metrics.kid import kid
from evaluations.metrics.precision_recall import precision_recall
from support.tiny_evaluation import (
    CLASSES,
    DIM,
    StandIn,
    folder,
    images_of,
    no_environment,
    run,
    values,
)
from support.warm import python

__all__ = ["folder", "no_environment"]                     # fixtures
ROOT = Path(__file__).resolve().parents[2]
METRIC_NAMES = default_names()


def with_statistics(path, images=None, dim=DIM, **more):
    x = np.random.default_rng(dim).normal(size=(3 * dim, dim))
    arrays = {} if images is None else {"arr_0": images}
    np.savez(path, mu=x.mean(0), sigma=np.cov(x, rowvar=False), **arrays, **more)
    return x.mean(0), np.cov(x, rowvar=False)


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
    ([0, 1, 2, 3], "class_names is not a list of names"),
])
def test_class_names_that_cannot_be_are_refused(named, tmp_path, names, message):
    with np.load(named) as batch:
        np.savez(tmp_path / "odd.npz", batch["arr_0"], batch["arr_1"], class_names=np.array(names))
    with pytest.raises(UserError, match=rf"odd.npz: {message}; write the file again"):
        BatchFile(tmp_path / "odd.npz").class_names()


def test_equal_sets_are_at_no_distance(folder):
    """And a warning says so: a forgotten argument would otherwise be the best model of all."""
    result = run(folder, sample="ref.npz")
    got = values(result)
    assert got["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert (got["precision"], got["recall"]) == (1, 1)
    (text,) = [text for text in result["warnings"] if "the same images" in text]
    assert text.startswith(f"the features of {folder / 'ref.npz'} and of {folder / 'ref.npz'} are equal")


def test_one_other_image_is_another_set(folder, tmp_path):
    with np.load(folder / "ref.npz") as batch:
        images = batch["arr_0"].copy()
    np.savez(tmp_path / "copy.npz", images)
    images[0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", images)
    for name, expected in {"copy.npz": 1, "other.npz": 0}.items():
        warnings = run(folder, sample=tmp_path / name, metrics=["fid"])["warnings"]
        assert sum("the same images" in text for text in warnings) == expected, name


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


@pytest.mark.parametrize("words, message", [
    (["--metrics", "fid", "--k", "4"], "--k 4 is for precision_recall, and --metrics asks for fid"),
    (["--metrics", "fid,kid", "--pr_dtype", "float16"], "--pr_dtype float16 is for precision_recall"),
    (["--metrics", "precision_recall", "--split_size", "7"], "--split_size 7 is for inception_score"),
    (["--metrics", "fid", "--k", "3"], ""), (["--k", "4", "--split_size", "7"], ""),
])
def test_a_flag_of_a_metric_that_is_not_asked_for_is_refused(words, message):
    args = evaluator_parser("").parse_args(["a.npz", "b.npz", *words])
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        asked_metrics(args)
