"""Durations in images: what they are in steps, and how a run is resumed with them."""

import pytest

from cm.config.flags import parse
from cm.config.objective_schema import FewStepConfig
from cm.config.schema import RunConfig, TrainConfig
from cm.errors import UserError
from cm.setup.durations import resolve_durations, steps_of


def resolved(*argv, batch=512):
    settings = parse("", TrainConfig, FewStepConfig, RunConfig, argv=[str(word) for word in argv])
    resolve_durations(settings, batch)
    return settings


def steps(*argv, batch=512):
    values = resolved(*argv, batch=batch).values
    return [values[name] for name in ("total_training_steps", "log_interval", "save_interval", "ema_rate")]


@pytest.mark.parametrize(("kimg", "batch", "count"), [
    (200_000, 512, 390_625), (50, 512, 98), (0.512, 512, 1), (0.513, 512, 2), (0.001, 512, 1), (0.3, 3, 100),
])
def test_steps_are_the_least_that_show_so_many_images(kimg, batch, count):
    assert steps_of(kimg, batch) == count


def test_flags_of_edm_become_steps():
    assert steps() == [0, 10, 10000, "0.9999"]
    assert steps("--total_kimg", 200_000, "--tick", 50, "--snap", 50, "--dump", 500, "--ema_halflife_kimg", 500) == [
        390_625, 98, 4900, "500kimg"
    ]
    assert steps("--tick", 50, "--snap", 50, "--dump", 10)[2] == 980        # the more frequent of both
    assert steps("--tick", 50, "--dump", 10)[2] == 980
    assert resolved("--stage_kimg", 100).values["stage_steps"] == 196
    assert steps("--ema_rate", "0.999,0.9999", "--ema_halflife_kimg", 0.5)[3] == "0.999,0.9999,0.5kimg"


@pytest.mark.parametrize(("argv", "message"), [
    (["--total_kimg", 100, "--total_training_steps", 7],
     "--total_training_steps asks for total_training_steps=7, and --total_kimg for total_kimg=100.0, which at 512 "
     "images per step is total_training_steps=196: give one"),
    (["--tick", 1, "--log_interval", 10], "log_interval=10, and --tick"),
    (["--tick", 1, "--snap", 2, "--save_interval", 10], "save_interval=10, and --snap for snapshot_ticks=2"),
    (["--snap", 2], "--snapshot_ticks and --state_dump_ticks count ticks: give --tick_kimg"),
])
def test_steps_and_images_at_once_are_an_error(argv, message):
    with pytest.raises(UserError, match=message):
        resolved(*argv)


def test_a_resolved_run_is_read_back_and_the_command_line_wins(tmp_path):
    argv = ["--total_kimg", 100, "--tick", 1, "--snap", 3, "--ema_halflife_kimg", 2]
    first, file = resolved(*argv), tmp_path / "config.json"
    file.write_text(first.as_text())
    assert resolved("--config", file).values == first.values
    assert steps("--config", file, "--total_training_steps", 7) == [7, 2, 6, "2kimg"]
    assert steps("--config", file, "--total_kimg", 10)[0] == 20
    with pytest.raises(UserError, match="config.json asks for .*give one of them on the command line"):
        resolved("--config", file, batch=100)


def test_training_that_ends_before_its_last_step_says_so(capsys):
    """The learning rate is 0 there."""
    resolved("--lr_anneal_steps", 10, "--total_training_steps", 30)
    told = capsys.readouterr()
    assert "training ends at step 10, where the learning rate is 0, not at step 30" in told.out + told.err
    for words in (["--lr_anneal_steps", 10], ["--lr_anneal_steps", 30, "--total_training_steps", 10]):
        resolved(*words)
        assert not any(capsys.readouterr())
