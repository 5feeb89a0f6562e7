"""Runs in shards are the runs of whole networks: weights, averages, optimizer, checkpoints, memory and errors."""

import json
from datetime import timedelta

import numpy as np
import pytest
import torch as th

from cm.distributed.fsdp import wait_as_long
from cm.errors import UserError
from cm.logging import logger
from cm.setup.convert_run import convert_run
from cm.training.config import LoopConfig
from cm.training.engine import Engine, check_sharded, make_engine
from support.commands import curve
from support.mpi import ROOT
from support.training import digest
from support.training import run as alone
from support.warm import mpiexec

pytestmark = pytest.mark.mpi


def write_images(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=pixels, arr_1=np.arange(20) % 3)
    return folder / "images.npz"


def run(folder, ranks, name):
    done = mpiexec(ranks, [ROOT / "tests/support/sharded_runs.py", write_images(folder), folder, name], timeout=240)
    assert done.rc == 0, done
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return run(tmp_path_factory.mktemp("pairs"), 2, "in_pairs")


def assert_same(one, other, step, rtol=1e-5, atol=2e-6):
    """Every tensor of two checkpoints.

    Sums over ranks and norms are taken in another order, so gradients differ by rounding; an optimizer's first steps
    hand it on times the learning rate of 1e-3.
    """
    names = sorted(path.name for path in one.glob(f"*{step:06d}.pt"))
    assert names == sorted(path.name for path in other.glob(f"*{step:06d}.pt")) and len(names) >= 4
    for name in names:
        expected, found = (tensors_in(th.load(each / name, weights_only=True)) for each in (one, other))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            th.testing.assert_close(found[key], value, rtol=rtol, atol=atol, msg=lambda why: f"{name} {key}: {why}")  # noqa: B023


def tensors_in(value, name=""):
    if isinstance(value, th.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: each for place, item in items for key, each in tensors_in(item, f"{name}.{place}").items()}


@pytest.mark.parametrize("name, step", [("edm", 3), ("cd", 2), ("scm", 2), ("edm2", 2)])
def test_a_run_in_shards_is_the_run_of_whole_networks(pairs, name, step):
    """Microbatches, dropout and clipping (edm); a target that moves and a teacher (cd); a derivative of the network
    (scm); forced weight normalisation, gains without axes, power-function averages (edm2)."""
    assert_same(pairs / f"{name} ddp", pairs / f"{name} fsdp", step)
    losses = [curve(pairs / f"{name} {parallel}") for parallel in ("ddp", "fsdp")]
    assert len(losses[0]) == step
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_blocks_that_are_gathered_in_bf16_compute_as_under_autocast(pairs):
    """The same roundings of the weights, but of norms': their weights start at 0 and 1, which bf16 has exactly."""
    ours, whole = (curve(pairs / f"bf16 {parallel}") for parallel in ("fsdp", "ddp"))
    np.testing.assert_allclose(ours, whole, rtol=1e-6)


def test_derivatives_within_bf16_are_taken_of_float32_weights(pairs):
    """Blocks are not gathered in bf16 then, which layers in float32 refuse."""
    ours, whole = (curve(pairs / f"scm bf16 {parallel}") for parallel in ("fsdp", "ddp"))
    np.testing.assert_allclose(ours, whole, rtol=1e-4)


def test_a_resumed_run_in_shards_is_the_same_run_to_the_last_bit(pairs):
    straight, resumed = digest(pairs / "edm fsdp", 3), digest(pairs / "edm fsdp then fsdp", 3)
    assert straight == resumed and len(straight) == 5


@pytest.mark.parametrize("change", ["ddp then fsdp", "fsdp then ddp"])
def test_a_run_goes_on_with_the_other_engine(pairs, change):
    assert_same(pairs / "edm ddp", pairs / f"edm {change}", 3)


def test_what_all_ranks_wrote_is_what_rank_0_would_have_written(pairs, tmp_path):
    """Written while the run went on, in shards; read by one process."""
    assert not list((pairs / "dcp fsdp").glob("model*.pt"))
    for name in ("fsdp", "ddp"):
        convert_run(str(pairs / f"dcp {name}"), str(tmp_path / name), "files")
        assert_same(pairs / f"edm {name}", tmp_path / name, 3, rtol=0, atol=0)


def test_a_run_goes_on_from_shares_on_the_same_ranks_to_the_last_bit(pairs):
    for name in ("fsdp", "ddp"):
        assert digest(pairs / f"edm {name}", 3) == digest(pairs / f"dcp {name} then {name}", 3)


def test_a_run_goes_on_from_shares_of_the_other_engine(pairs):
    """There the optimizer and the averages are in shares of whole tensors."""
    assert_same(pairs / "edm ddp", pairs / "dcp fsdp then ddp", 3)


@pytest.mark.parametrize("name", ["edm", "cd"])
def test_ranks_hold_the_memory_that_was_planned(pairs, name):
    for rank in json.loads((pairs / "memory.json").read_text()):
        held, planned = rank[name]
        planned.pop("gathered for a pass")                  # which is given back when the pass has ended
        assert held.keys() == planned.keys()
        for part, size in held.items():                     # scalars of the optimizer, and rows that fill up the last
            assert size == pytest.approx(planned[part], rel=0.02), part


def test_a_gradient_that_is_not_finite_on_one_rank_ends_the_step_on_all(pairs):
    for said in json.loads((pairs / "errors.json").read_text()):
        assert "every loss is finite, but not the gradient" in said["non-finite"] and said["untouched"]


def test_ranks_with_unequal_numbers_of_passes_are_refused(pairs):
    for said in json.loads((pairs / "errors.json").read_text()):
        assert said["passes"].startswith("UserError: the ranks need 3, 1 passes per step")


def test_four_ranks_in_two_replicas_are_one_process(tmp_path):
    run(tmp_path, 4, "on_four")
    alone(str(tmp_path / "images.npz"), tmp_path / "alone", 2, grad_clip=0.01, save_interval=2)
    logger.reset()
    assert_same(tmp_path / "alone", tmp_path / "hsdp", 2)
    np.testing.assert_allclose(curve(tmp_path / "hsdp"), curve(tmp_path / "alone"), rtol=1e-5)
    for held, planned in json.loads((tmp_path / "memory.json").read_text()):
        assert sum(held.values()) == pytest.approx(sum(planned.values()) - planned["gathered for a pass"], rel=0.02)


# --- what cannot be divided ------------------------------------------------------------------------------------------


def config(**options):
    return LoopConfig(batch_size=1, lr=0.0, ema_rate="", log_interval=1, save_interval=1, **options)


def test_whole_networks_are_the_default():
    assert type(make_engine(config(), th.device("cpu"), False)) is Engine
    with pytest.raises(UserError, match="parallel"):
        make_engine(config(parallel="zero"), th.device("cpu"), False)


def test_one_rank_has_nobody_to_share_with():
    with pytest.raises(UserError, match="there is only one: start several"):
        make_engine(config(parallel="fsdp"), th.device("cpu"), False)


@pytest.mark.parametrize("flag, value, remedy", [
    ("--precision", "fp16", "bf16 or fp32"), ("--shard_ema", True, "drop --shard_ema"),
    ("--shard_optimizer", True, "drop --shard_optimizer"), ("--compile", True, "drop --compile"),
])
def test_flags_that_do_not_go_with_shards(flag, value, remedy):
    with pytest.raises(UserError, match=remedy):
        check_sharded("hsdp", 2, {flag: value})
    check_sharded("hsdp", 2, {flag: False})


def test_groups_of_a_mesh_have_the_time_limit_of_the_job():
    """Those that torch makes for replicas would wait for half an hour. "cuda" has a backend of its own, as on GPUs."""
    th.distributed.init_process_group("cpu:gloo,cuda:gloo", store=th.distributed.HashStore(), rank=0, world_size=1,
                                      timeout=timedelta(seconds=77))
    try:
        group = th.distributed.new_group([0])
        wait_as_long(group)
        limits = {group._get_backend(th.device(name)).options._timeout for name in ("cpu", "cuda")}
        assert limits == {timedelta(seconds=77)}
    finally:
        th.distributed.destroy_process_group()
