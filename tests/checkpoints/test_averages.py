"""Averages that still hold the weights of the start: their share in closed form, and the file to take instead."""

import pytest

from cm.checkpoints import averages, manifest
from cm.setup.weights_path import weights_in
from support.nets import plain_state_dict
from support.weights import TINY, adopt, tiny

WEIGHTS = plain_state_dict(tiny())
CONFIG = {**TINY, "training_mode": "edm"}


def save(folder, step, names, shares=None, **config):
    content = {name: WEIGHTS for name in names}
    return manifest.save(str(folder), step, content, CONFIG | config, 40 * step, initial_weight=shares)


def test_whoever_samples_a_young_average_is_told_what_to_take(tmp_path, capsys):
    shares = {"ema_0.999": 0.42, "ema_0.9": 0.01}
    save(tmp_path, 868, ["model", *shares], shares)
    adopt(tmp_path / "ema_0.999_000868.pt")
    told = capsys.readouterr()
    assert "ema_0.999_000868.pt still holds 42% of the weights that the run started from" in told.out + told.err
    assert f"take {tmp_path}/ema_0.9_000868.pt" in told.out + told.err
    for name in ("ema_0.9_", "model"):
        adopt(tmp_path / f"{name}000868.pt")
    told = capsys.readouterr()
    assert "still holds" not in told.out + told.err
    assert weights_in(str(tmp_path), "model_path") == f"{tmp_path}/ema_0.9_000868.pt"


def test_without_a_fit_average_the_model_is_taken(tmp_path):
    checkpoint = save(tmp_path, 5, ["model", "ema_0.9999"], {"ema_0.9999": 0.9995})
    assert averages.best_name(checkpoint) == "model"
    assert weights_in(str(tmp_path), "model_path") == f"{tmp_path}/model000005.pt"
    assert f"take {tmp_path}/model000005.pt" in averages.warning(checkpoint, f"{tmp_path}/ema_0.9999_000005.pt")
    alone = save(tmp_path / "best", 5, ["ema_0.9999"], {"ema_0.9999": 0.9995})
    assert "train for longer" in averages.warning(alone, "ema_0.9999_000005.pt")


def test_shares_of_manifests_that_do_not_record_them(tmp_path):
    """Those of their own time, when only half-lives had a warm-up."""
    old = save(tmp_path, 868, ["model", "ema_0.999"], ema_rampup_ratio=0.05)
    assert averages.initial_weight(old, "ema_0.999") == pytest.approx(0.999**868, rel=1e-12)
    assert averages.initial_weight(old, "ema_500kimg") == 0
    assert averages.initial_weight(old, "model") is None
    steady = save(tmp_path, 100, ["model"], ema_rampup_ratio=0)
    assert averages.initial_weight(steady, "ema_4kimg") == pytest.approx(0.5, rel=1e-12)    # 4000 images seen
    staged = save(tmp_path, 100, ["model"], training_mode="progdist")
    assert averages.initial_weight(staged, "ema_0.9999") is None
    assert not averages.is_immature(staged, "ema_0.9999")
    assert manifest.read(old.manifest) == old


def test_a_power_function_copied_the_weights_at_its_start(tmp_path):
    checkpoint = save(tmp_path, 5, ["model", "ema_power0.05"], {})
    assert averages.initial_weight(checkpoint, "ema_power0.05") == 0
    assert averages.best_name(checkpoint) == "ema_power0.05"
