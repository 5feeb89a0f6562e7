"""A run that goes on does not turn into another one."""

import pytest

from cm.checkpoints.manifest import Checkpoint
from cm.errors import UserError
from cm.training.same_run import require_same_run
from support.training import loop, run

EDM = {
    "training_mode": "edm", "objective": "edm", "arch": "unet", "image_size": 8, "num_heads": 4,
    "num_heads_upsample": -1, "num_head_channels": -1, "precond": "edm", "time_scale": 0.0, "sigma_min": 0.002,
    "sigma_max": 80.0, "lr": 1e-4,
}
STUDENT = EDM | {"training_mode": "consistency_distillation"}


def go_on(before, now, resume="auto"):
    require_same_run(Checkpoint("runs/a", 3, 12, before, {}), now, resume)


@pytest.mark.parametrize(("before", "change"), [
    (EDM, {"num_heads": 2}), (EDM, {"num_head_channels": 64}), (EDM, {"num_heads_upsample": 1}),
    (EDM, {"image_size": 16}), (EDM, {"precond": "vp"}), (EDM, {"time_scale": 4.0}),
    (STUDENT, {"sigma_min": 0.01}), (STUDENT, {"sigma_max": 40.0}),
])
@pytest.mark.parametrize("resume", ["auto", "runs/a"])
def test_weights_do_not_become_another_network(before, change, resume):
    """Names and shapes are the same, so nothing else would tell."""
    ((name, value),) = change.items()
    with pytest.raises(UserError) as error:
        go_on(before, before | change, resume)
    was, now = str(error.value).split("and this run has")
    assert f"--{name} {before[name]}" in was and "runs/a/checkpoint_000003.json" in was
    assert f"--{name} {value}" in now and f"Give --{name} {before[name]}" in now
    assert "another --log_dir" in now


@pytest.mark.parametrize("change", [
    {"lr": 1.0}, {"time_scale": 1000.0}, {"num_heads_upsample": 4}, {"sigma_max": 40.0}, {"new": 1},
])
def test_what_means_the_same_may_change(change):
    go_on(EDM, EDM | change)
    go_on(EDM | change, EDM)


def test_heads_count_only_where_they_are_used():
    wide = EDM | {"num_head_channels": 32}
    go_on(wide, wide | {"num_heads": 1})
    go_on(EDM | {"arch": "edm2"}, EDM | {"arch": "edm2", "num_heads": 1})


@pytest.mark.parametrize(("before", "now"), [
    (EDM, EDM | {"training_mode": "ict"}), (EDM, EDM | {"objective": "stf"}), (STUDENT, EDM),
    (STUDENT, STUDENT | {"training_mode": "consistency_training"}), (STUDENT, STUDENT | {"training_mode": "meanflow"}),
])
def test_another_method_does_not_take_over_the_folder_of_a_run(before, now):
    """It would remove the checkpoints of the run one by one."""
    with pytest.raises(UserError, match="runs/a holds a run with .*choose another --log_dir.*--resume_checkpoint"):
        go_on(before, now)


def test_a_method_of_the_same_kind_may_follow_when_it_is_asked_for():
    go_on(EDM, EDM | {"objective": "stf"}, "runs/a")
    go_on(STUDENT, STUDENT | {"training_mode": "consistency_training"}, "runs/a")
    with pytest.raises(UserError, match="holds a run with") as error:
        go_on(EDM, STUDENT, "runs/a")
    assert "continues anyway" not in str(error.value)


def test_a_loop_asks(images, tmp_path):
    run(images, tmp_path, 1)
    with pytest.raises(UserError, match="--image_size 8, and this run has --image_size 16"):
        loop(images, tmp_path, 2, config={"image_size": 16}).resume()
