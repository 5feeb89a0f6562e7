"""Images, feature networks and files for tests of the evaluation, all as small as can be.

Shapes: N images, DIM features, CLASSES logits.
"""

from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import nn

from evaluations.evaluator import evaluate
from evaluations.features import Features, load_extractor, save_torchscript

DIM, CLASSES = 6, 4


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


class StandIn:
    """Anything with this call is an extractor."""

    id, name, resize, is_inception = "torchscript-0123", "Inception-v3", "bilinear to 299x299", True

    def extract(self, images):
        x = images.reshape(len(images), -1).astype(np.float32)
        return Features(x[:, :DIM], x[:, DIM : DIM + 3], x[:, :CLASSES])


def write_files(folder: Path) -> None:
    """Reference and sample images, and extractor files."""
    rng = np.random.default_rng(0)
    ref = rng.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    sample = rng.integers(40, 256, (50, 4, 4, 3), dtype=np.uint8)
    np.savez(folder / "ref.npz", ref)
    np.savez(folder / "sample.npz", sample, rng.integers(0, CLASSES, 50))
    save_torchscript(Features2(), f"{folder}/two.ts", "tiny", "none")
    save_torchscript(Features3(), f"{folder}/three.ts", "tiny3", "none")
    save_torchscript(OnlyFeatures(), f"{folder}/one.ts", "colours", "none")


def images_of(path):
    with np.load(path) as batch:
        return batch["arr_0"]


def run(folder, extractor="two.ts", ref="ref.npz", sample="sample.npz", **options):
    loaded = load_extractor(str(folder / extractor), trusted=True) if extractor else None
    return evaluate(folder / ref, folder / sample, loaded, **options)


def values(result):
    return {key: fields["value"] for key, fields in result["metrics"].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of `write_files`. A test module imports this fixture and the next one by name."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_files(folder)
    return folder


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """No extractor is set by the environment of whoever runs the tests."""
    monkeypatch.delenv("CM_INCEPTION", raising=False)
