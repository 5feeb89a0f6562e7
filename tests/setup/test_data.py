"""The images of a run and its flags."""

import numpy as np
import pytest
from PIL import Image

from cm.config.flags import parse
from cm.config.objective_schema import ObjectiveConfig
from cm.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from cm.errors import UserError
from cm.setup.data import open_data


def test_too_few_references_are_named():
    settings = parse("", ModelConfig, ObjectiveConfig, DataConfig, TrainConfig, RunConfig, argv=[
        "--objective", "stf", "--num_references", "8", "--global_batch_size", "16", "--data_dir", "digits",
        "--image_size", "8",
    ])
    with pytest.raises(UserError, match="--num_references 8 is less than the 16 images.*--num_references 16 or more"):
        open_data(settings, references=8)


def test_what_large_numbers_cost_is_said(capsys):
    def told(**more):
        words = [f"--{name}={value}" for name, value in more.items()]
        open_data(parse("", ModelConfig, ObjectiveConfig, DataConfig, TrainConfig, RunConfig, argv=[
            "--objective", "stf", "--global_batch_size", "16", "--data_dir", "digits", "--image_size", "8", *words,
        ]), references=more.get("num_references", 64))
        return "".join(capsys.readouterr())

    assert told() == ""
    assert "--num_references 5000 is more than the 1797 images of the data set: every step" in told(num_references=5000)
    assert "--num_workers 256 starts 256 processes per rank" in told(num_workers=256)
    with pytest.raises(UserError, match="num_workers=1000 is too large; the largest is 256"):
        told(num_workers=1000)


def test_images_beside_the_folders_of_classes_are_told(tmp_path, capsys):
    """They are class 0, which has no name, and move the numbers of the others."""
    for name in ("cat/0.png", "dog/0.png", "loose.png", "cat/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    flags = ["--data_dir", str(tmp_path), "--class_cond", "True", "--image_size", "8", "--global_batch_size", "2"]

    def told():
        open_data(parse("", ModelConfig, ObjectiveConfig, DataConfig, TrainConfig, RunConfig, argv=flags))
        return "".join(capsys.readouterr())

    assert "1 of 4 images are in no sub-folder" in told()
    (tmp_path / "loose.png").unlink()
    assert "are in no sub-folder" not in told()
