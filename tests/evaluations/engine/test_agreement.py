"""References and samples that do not fit together are refused, and odd numbers come with their true reason."""

import numpy as np
import pytest
import torch as th
from PIL import Image
from torch import nn

from cm.data.loader import load_data
from cm.errors import UserError
from evaluations.engine.readers import BatchFile
from evaluations.evaluator import evaluate
from evaluations.features import Features, load_extractor, save_torchscript
from evaluations.fid import calc, ref
from evaluations.th_evaluator import ThEvaluator


class Coarse(nn.Module):
    """Twelve averages, of images of any size."""

    def forward(self, images: th.Tensor) -> th.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


class Named:
    """An extractor with a resize rule of choice."""

    id, name, is_inception = "torch-1", "named", False

    def __init__(self, resize):
        self.resize = resize

    def extract(self, images):
        return Features(images.astype(np.float32).mean((1, 2)), None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    save_torchscript(Coarse(), str(folder / "coarse.ts"), "coarse", "none")
    rng = np.random.default_rng(0)
    for side in (8, 16):
        np.savez(folder / f"{side}.npz", rng.integers(0, 256, (30, side, side, 3), dtype=np.uint8))
    (folder / "files").mkdir()
    for i in range(12):
        height, width = rng.integers(10, 40, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / "files" / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def extractor(folder):
    return load_extractor(str(folder / "coarse.ts"), trusted=True)


@pytest.fixture(scope="module")
def made(folder, extractor):
    """A reference with all that it can record."""
    ref(str(folder / "8.npz"), str(folder / "made.npz"), extractor)
    return str(folder / "made.npz")


def test_a_reference_records_size_and_resize_rule(made, extractor):
    found = BatchFile(made).statistics()
    assert (found.image_size, found.resize, found.extractor) == ((8, 8), "none", extractor.id)


def test_statistics_of_another_size_are_refused(folder, made, extractor):
    message = r"made.npz are of images of 8x8 and those of .* of 16x16 .*fid.py ref --image_size 16"
    samples = str(folder / "16.npz")
    with pytest.raises(UserError, match=message):
        calc(samples, made, extractor, num=30)
    with pytest.raises(UserError, match=message):
        evaluate(made, samples, extractor, metrics=["fid"])
    with pytest.raises(UserError, match=message):
        ThEvaluator(made, extractor, 16)
    assert calc(str(folder / "8.npz"), made, extractor, num=30)["value"] == pytest.approx(0, abs=1e-9)


def test_statistics_under_another_resize_rule_are_refused(folder, tmp_path):
    samples, made = str(folder / "8.npz"), str(tmp_path / "made.npz")
    ref(samples, made, Named("bicubic to 4x4"))
    for compare in (lambda: calc(samples, made, Named("area to 4x4"), num=30),
                    lambda: evaluate(made, samples, Named("area to 4x4"), metrics=["fid"])):
        with pytest.raises(UserError, match="rule 'bicubic to 4x4' and those of .*with 'area to 4x4'"):
            compare()
    assert calc(samples, made, Named("bicubic to 4x4"), num=30)["value"] == pytest.approx(0, abs=1e-9)


def test_older_statistics_are_taken_with_one_line(folder, made, extractor, tmp_path, capsys):
    with np.load(made) as file:
        np.savez(tmp_path / "old.npz", mu=file["mu"], sigma=file["sigma"])
    assert calc(str(folder / "16.npz"), str(tmp_path / "old.npz"), extractor, num=30)["value"] > 0
    notices = [line for line in capsys.readouterr().out.splitlines() if line.startswith("notice: ")]
    assert len(notices) == 1 and "old.npz does not record the image size and resize rule and extractor" in notices[0]


def test_a_reference_is_cropped_and_resized_as_training_does(folder, extractor, tmp_path):
    text = ref(str(folder / "files"), str(tmp_path / "made.npz"), extractor, num_images=12, image_size=8)
    assert "of 12 images, cropped and resized to 8x8 as for training" in text
    images, _ = next(load_data(data_dir=str(folder / "files"), batch_size=12, image_size=8, deterministic=True,
                               random_flip=False))
    seen = ((images + 1) * 127.5).round().to(th.uint8).permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "made.npz") as file:
        assert np.array_equal(file["arr_0"], seen) and file["image_size"].tolist() == [8, 8]
    ref(str(folder / "16.npz"), str(tmp_path / "npz.npz"), extractor, image_size=8)
    assert BatchFile(tmp_path / "npz.npz").statistics().image_size == (8, 8)


def test_fewer_images_than_asked_for_come_with_the_remedy(folder, made, extractor, tmp_path):
    with pytest.raises(UserError, match="give --images 12 or fewer"):
        ref(str(folder / "files"), str(tmp_path / "r.npz"), extractor, num_images=13, image_size=8)
    with pytest.raises(UserError, match="make more images, or give --num 30"):
        calc(str(folder / "8.npz"), made, extractor, num=31)


def test_collapsed_samples_are_called_that(folder, extractor, tmp_path):
    """Equal images leave rounding noise alone, which no stored statistics are to blame for."""
    one = np.load(folder / "8.npz")["arr_0"][:1]
    np.savez(tmp_path / "same.npz", np.repeat(one, 200, 0))
    warnings = evaluate(folder / "8.npz", tmp_path / "same.npz", extractor, metrics=["fid"])["warnings"]
    assert not [text for text in warnings if "damaged" in text]
    assert [text for text in warnings if "the samples (" in text and "are all but identical" in text], warnings


@pytest.mark.parametrize("convert, found", [
    (lambda x: x / 127.5 - 1, "float32.*from \\[-1, 1\\] with .*the first image lies between -"),
    (lambda x: x / 255, "float32.*from \\[0, 1\\] with .*the first image lies between 0"),
    (lambda x: x * 1.0, "float32.*from \\[0, 255\\] with x.round"),
    (lambda x: x.transpose(0, 3, 1, 2).astype(np.uint8), r"are NCHW, but must be NHWC: x.transpose\(0, 2, 3, 1\)"),
    (lambda x: x[..., 0].astype(np.uint8), "lack an axis of channels"),
])
def test_images_of_another_form_are_told_how_to_convert(folder, tmp_path, convert, found):
    x = np.load(folder / "8.npz")["arr_0"].astype(np.float32)
    np.savez(tmp_path / "x.npz", convert(x))
    with pytest.raises(UserError, match=found) as refused:
        BatchFile(tmp_path / "x.npz")
    assert "damaged" not in str(refused.value)
