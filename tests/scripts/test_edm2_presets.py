"""configs/edm2: the published run of EDM2, as far as the toolkit has its settings."""

from pathlib import Path

import torch as th

from cm.config.flags import parse
from cm.config.schema import DataConfig, DiffusionConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from cm.setup.model import model_from

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "edm2"
PUBLISHED = {"imagenet512_xs": (125, {"lr": 0.012, "global_batch_size": 2048, "dropout": 0.0, "use_fp16": True,
                                    "lr_decay_steps": 70_000, "objective": "uncertainty", "noise_mean": -0.4,
                                    "noise_std": 1.0})}


def test_every_preset_is_the_published_run():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PUBLISHED)
    for name, (millions, recipe) in PUBLISHED.items():
        path = CONFIGS / f"{name}.yaml"
        settings = parse("", ObjectiveConfig, ModelConfig, DiffusionConfig, DataConfig, TrainConfig, RunConfig,
                         argv=["--config", str(path)])
        assert recipe.items() <= settings.values.items() and settings.values["arch"] == "edm2"
        assert round(settings.values["total_kimg"] * 1000) >= 2048 << 20
        with th.device("meta"):
            model = model_from(settings)
        assert round(sum(param.numel() for param in model.parameters()) / 1e6) == millions
        assert "Not run here" in path.read_text()
