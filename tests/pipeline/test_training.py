"""`cm.train` takes the flags of the commands; tests/examples runs it."""

import pytest

import cm
from cm.errors import UserError
from cm.pipeline.training import training_settings


def test_the_defaults_are_those_of_the_command():
    edm, ect = (training_settings({"training_mode": mode, "log_dir": "x"}) for mode in ("edm", "ect"))
    assert (edm.values["schedule_sampler"], ect.values["schedule_sampler"]) != ("", "")
    assert ect.values["total_training_steps"] == 600_000 != edm.values["total_training_steps"]
    assert not ect.is_given("total_training_steps") and ect.is_given("training_mode")


@pytest.mark.parametrize("flags, message", [
    ({"learning_rate": 1}, "there is no option 'learning_rate'"),
    ({"lr": "fast"}, "lr='fast' is not a float"),
    ({"training_mode": "edn"}, "Did you mean 'edm'"),
    ({"checkpoint_dir": "elsewhere"}, "keeps its checkpoints in log_dir"),
    ({"data_dir": "nowhere"}, "nowhere"),
])
def test_mistakes(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        cm.train(tmp_path, **flags)
