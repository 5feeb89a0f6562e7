"""The images of a run and its flags."""

import pytest

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
