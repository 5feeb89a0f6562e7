"""configs/edm2: the published runs of EDM2, as far as the toolkit has their settings."""

from pathlib import Path

import pytest
import torch as th

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.setup.model import model_from

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "edm2"
COMMON = {"arch": "edm2", "global_batch_size": 2048, "use_fp16": True, "lr_decay_steps": 70_000, "channels": 4,
          "adam_beta2": 0.99, "lr_rampup_kimg": 10_000, "objective": "uncertainty", "noise_mean": -0.4,
          "noise_std": 1.0, "image_size": 64, "class_cond": True, "num_classes": 1000}
# Width, learning rate, images in units of 2^20 and dropout of train_edm2.py, and the parameters of its networks.
PUBLISHED = {
    "xs": (128, 0.012, 2048, 0.0, 124_713_253), "s": (192, 0.010, 2048, 0.0, 280_212_837),
    "m": (256, 0.009, 2048, 0.1, 497_807_781), "l": (320, 0.008, 1792, 0.1, 777_498_085),
    "xl": (384, 0.007, 1280, 0.1, 1_119_283_749), "xxl": (448, 0.0065, 896, 0.1, 1_523_164_773),
}


def test_all_sizes_are_there():
    assert {path.stem for path in CONFIGS.glob("imagenet*.yaml")} == {f"imagenet512_{size}" for size in PUBLISHED}


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_preset_is_the_published_run(size):
    width, lr, duration, dropout, parameters = PUBLISHED[size]
    path = CONFIGS / f"imagenet512_{size}.yaml"
    settings = parse("", *TRAINING_SECTIONS, argv=["--config", str(path)])
    own = {"num_channels": width, "lr": lr, "dropout": dropout}
    assert (COMMON | own).items() <= settings.values.items()
    assert settings.values["adam_eps"] * 4 * 64**2 == pytest.approx(1e-8, rel=2e-3), "the loss is a mean, there a sum"
    assert settings.values["total_kimg"] * 1000 == duration << 20
    with th.device("meta"):
        model = model_from(settings)
    assert sum(param.numel() for param in model.parameters()) == parameters
    assert "Not run here" in path.read_text()
