"""Runs that cannot be divided as --parallel says are refused by name, before they open anything."""

from types import SimpleNamespace

import pytest

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.setup.dry_run import planned_shards
from cm.setup.parallel import check_parallel
from cm.setup.rules import TRAINING


def settings_of(*argv):
    return parse("", *TRAINING_SECTIONS, argv=argv, training_mode="consistency_distillation")


@pytest.mark.parametrize("argv, words", [
    (("--parallel", "fsdp"), "there is only one: start several, such as mpiexec -n 8"),
    (("--shard_size", "2"), "--shard_size 2 is for --parallel hsdp, and this run has --parallel ddp"),
    (("--parallel", "fsdp", "--dry_run_ranks", "4", "--shard_size", "2"), "is for --parallel hsdp"),
    (("--parallel", "fsdp", "--dry_run_ranks", "4", "--precision", "fp16"), "--precision fp16 and --parallel fsdp"),
    (("--parallel", "hsdp", "--dry_run_ranks", "4", "--compile", "True"), "--compile True and --parallel hsdp"),
    (("--parallel", "hsdp", "--dry_run_ranks", "4", "--shard_ema", "True"), "drop --shard_ema"),
    (("--async_save", "True"), "--async_save True needs --checkpoint_format dcp"),
    (("--checkpoint_format", "dcp", "--checkpoint_dir", "gs://bucket/run"), "gs://bucket/run is an object store"),
])
def test_what_does_not_go_together_is_refused(argv, words):
    with pytest.raises(UserError, match=words):
        check_parallel(settings_of(*argv))


def test_what_goes_together_is_not():
    for argv in ((), ("--parallel", "hsdp", "--dry_run_ranks", "4", "--shard_size", "2", "--precision", "bf16")):
        check_parallel(settings_of(*argv))
    assert check_parallel in TRAINING


def test_a_teacher_that_guides_itself_at_some_noise_levels_takes_unequal_passes():
    settings = settings_of("--parallel", "fsdp", "--dry_run_ranks", "2", "--teacher_guide_interval", "0.1,3")
    check_parallel(settings)
    settings.sources["teacher_guide"] = SimpleNamespace(settings=object())     # a network of its own, which is whole
    check_parallel(settings)
    settings.sources["teacher_guide"] = SimpleNamespace(settings=None)
    with pytest.raises(UserError, match="--teacher_guide_interval 0.1,3 and --parallel fsdp"):
        check_parallel(settings)


def test_the_memory_plan_counts_the_ranks_that_share():
    assert [planned_shards(*case) for case in (("ddp", 0, 8), ("fsdp", 0, 8), ("hsdp", 4, 8), ("hsdp", 0, 8))] == [
        1, 8, 4, 8]
