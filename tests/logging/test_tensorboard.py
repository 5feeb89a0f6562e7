"""Event files, read back by TensorBoard's own reader."""

import io
import sys
import types

import numpy as np
import pytest
import torch as th
from PIL import Image

from cm.errors import UserError
from cm.logging import FORMATS, logger, writers


@pytest.fixture(autouse=True)
def close_log():
    yield
    logger.reset()


@pytest.fixture
def read(monkeypatch):
    """A reader that does without TensorFlow, whose import takes seconds."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return lambda folder: EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_curves_pictures_and_flags_over_the_step(tmp_path, read):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    logger.configure(tmp_path, ["tensorboard"])
    logger.log_config({"lr": 1e-4, "ts": "a|b"})
    for step in (5, 10):
        logger.logkvs({"step": step, "loss": th.tensor(1 / step), "name": "text is no curve", "loss_q0": None})
        logger.dumpkvs()
    logger.log_images(10, "samples", picture)
    found = read(tmp_path / "tb")
    assert found.Tags()["scalars"] == ["loss"] and found.Tags()["images"] == ["samples"]
    points = [(point.step, point.value) for point in found.Scalars("loss")]
    assert points == [(5, pytest.approx(0.2)), (10, pytest.approx(0.1))]
    shown = found.Images("samples")[0]
    assert (shown.step, shown.width, shown.height) == (10, 6, 4)
    assert (np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))) == picture).all()
    [text] = found.Tensors("config")
    assert b"| lr | 0.0001 |\n| ts | a\\|b |" in text.tensor_proto.string_val[0]


def test_a_resumed_run_shows_no_step_twice(tmp_path, read):
    for start in (0, 2):
        logger.configure(tmp_path, ["tensorboard"], resume_step=start)
        for step in range(start + 1, start + 4):
            logger.logkvs({"step": step, "loss": start + step / 8})
            logger.dumpkvs()
    points = [(point.step, point.value) for point in read(tmp_path / "tb").Scalars("loss")]
    assert points == [(1, 0.125), (2, 0.25), (3, 2.375), (4, 2.5), (5, 2.625)]


def test_rows_without_a_step_are_numbered(tmp_path, read):
    logger.configure(tmp_path, ["tensorboard"])
    for loss in (0.5, 0.25):
        logger.logkv("loss", loss)
        logger.dumpkvs()
    assert [(point.step, point.value) for point in read(tmp_path / "tb").Scalars("loss")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_its_package_a_format_names_the_extra_and_nothing_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(writers, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"'{name}' needs the package {name}.*pip install '.\[{name}\]'"):
        logger.configure(tmp_path / "run", ["csv", name])
    assert not (tmp_path / "run").exists()
    extras = {kind.package for kind in FORMATS.values()} - {""}
    assert extras == {"tensorboard", "wandb"}
