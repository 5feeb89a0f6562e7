"""The planned memory: of a checkpoint, of activations, and of averages on the host."""

import sys

import pytest
import torch as th
import torch.nn.functional as F

from cm.networks.layers import GroupNorm32
from cm.training.memory_estimate import PlannedRun, activations, plan
from support.mpi import ROOT
from support.training import loop, network, run

sys.path.insert(0, str(ROOT / "benchmarks"))
from memory_table import table

from support.memory_cases import meta_network


def test_a_checkpoint_is_as_large_as_planned(images, tmp_path):
    run(images, tmp_path, 1, mode="progdist", use_fp16=True)
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    run_ = PlannedRun("fp16", "radam", ["0.5", "0.9"], companions={"teacher_model": "by_objective"})
    planned = plan(meta_network(), run_).checkpoint
    # A file adds a header of some hundred bytes to each of its tensors.
    tensors = 4 * 60 + 3 * 60
    assert planned < on_disk < planned + 700 * tensors


def norm_of_a_gpu(norm, x):
    return F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).to(x.dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_that_autograd_keeps(precision, monkeypatch):
    """Images that lie channels first go through the same operations on a CPU as on a GPU, but for half-precision norms.

    The estimate rounds embeddings and the output layer too, which autocast leaves alone: some percent of this network.
    """
    monkeypatch.setattr(GroupNorm32, "forward", norm_of_a_gpu)
    monkeypatch.setattr("cm.networks.attention_cpu.LONGEST", 0)      # of a CPU alone
    model, kept = network(), {}
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    inputs = [th.randn(4, 3, 8, 8), th.rand(4), th.tensor([0, 1, 2, 0])]
    cast = th.autocast("cpu", dtype=th.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    with cast, th.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    measured = sum(storage.nbytes() for storage in kept.values())
    tolerance = 1e-9 if precision == "fp32" else 0.03
    assert activations(meta_network(), 4, 8, precision, class_cond=True) == pytest.approx(measured, rel=tolerance)


def test_activations_grow_with_images_and_shrink_with_recomputation():
    model = meta_network()
    one, two, four = (activations(model, count, 8, "fp32", True) for count in (1, 2, 4))
    assert four - two == 2 * (two - one) > 0
    for module in model.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = True
    assert activations(model, 4, 8, "fp32", True) < four / 2


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_companions_hold_what_is_planned(images, tmp_path, precision):
    """A teacher that stands still, and a target: of each every tensor once."""
    training = loop(images, tmp_path, 1, mode="consistency_distillation", precision=precision)
    run_ = PlannedRun(precision, "radam", [], companions={"teacher_model": "never", "target_model": "by_objective"},
                      stores_casts=not training.objective.full_precision_passes)
    planned = plan(meta_network(), run_).device
    for name, companion in training.parts.companions.items():
        masters = training.moving[name].master_params if name in training.moving else ()
        tensors = [*companion.model.parameters(), *companion.model.buffers(), *masters]
        kept = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}
        assert planned[name.removesuffix("_model")] == sum(kept.values())


def test_averages_on_the_host_leave_the_device():
    run_ = PlannedRun("fp32", "adam", ["0.9", "0.99"], ranks=4)
    near, far = plan(meta_network(), run_), plan(meta_network(), PlannedRun(**vars(run_) | {"ema_device": "cpu"}))
    size = near.device["parameters"]
    assert sum(near.device.values()) - sum(far.device.values()) == 2 * size and not near.host
    assert far.host == {"average 0.9": size, "average 0.99": size, "copy for the averages": size}


def test_a_plan_of_shards_counts_what_is_gathered():
    """A network of one rank's size, what is gathered of it for a pass, and whole gradients between microbatches."""
    run_ = {"precision": "fp32", "optimizer": "adam", "ema_rates": ["0.9"], "ranks": 4}
    whole = plan(meta_network(), PlannedRun(**run_)).device
    once = plan(meta_network(), PlannedRun(**run_, shards=4)).device
    twice = plan(meta_network(), PlannedRun(**run_, shards=4, accumulates=True)).device
    for name in whole:
        assert once[name] == pytest.approx(whole[name] / 4, rel=0.01)
    assert whole["parameters"] / 4 < once["gathered for a pass"] < 2 * whole["parameters"]
    assert twice == once | {"gradients of microbatches": whole["gradients"]}


def test_a_save_in_the_background_takes_the_share_of_a_rank():
    run_ = {"precision": "fp32", "optimizer": "adam", "ema_rates": ["0.9"], "ranks": 4, "async_save": True}
    for shards in (1, 4):
        planned = plan(meta_network(), PlannedRun(**run_, shards=shards))
        assert planned.host == {"copy for a save": planned.checkpoint // 4}


@pytest.mark.parametrize("name", ["ImageNet-64", pytest.param("LSUN-256", marks=pytest.mark.slow)])
def test_the_table_of_the_docs_is_what_the_command_prints(name):
    rows = table(name)
    assert len(rows) == 8 and set(rows) <= set((ROOT / "docs" / "memory.md").read_text().splitlines())
