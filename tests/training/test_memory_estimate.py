"""Shares of averages and optimizer change no bit of any file, and the planned memory is what a rank holds."""

import hashlib
import itertools
import json
import sys
import threading

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from cm.checkpoints import manifest
from cm.distributed.sharding import partition
from cm.errors import UserError
from cm.logging import logger
from cm.networks.layers import GroupNorm32
from cm.setup.dry_run import dry_run
from cm.setup.train import loop_config
from cm.training import state
from cm.training.ema import EMA, Background
from cm.training.memory_estimate import PlannedRun, activations, plan
from cm.training.optimizer import ZeroOptimizer, make_optimizer
from support.mpi import ROOT, mpi_program
from support.training import loop, network, run

sys.path.insert(0, str(ROOT / "benchmarks"))

from memory_table import settings_of, table

from support.memory_cases import CASES, meta_network

# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, ranks", [
    ([5, 3, 8, 1, 1, 9, 4, 4], 3), ([100, 1, 1, 1], 2), ([2] * 7, 7), ([3, 3, 2, 2, 2], 2), ([4], 3), ([0, 0, 1], 2),
])
def test_shares_are_whole_complete_and_balanced(sizes, ranks):
    """Against the best of all ways to share out, tried one by one: within Graham's bound."""
    shares = partition(sizes, 0, ranks)
    assert sorted(sum((shares.of(rank, range(len(sizes))) for rank in range(ranks)), [])) == list(range(len(sizes)))
    largest = max(sum(shares.of(rank, sizes)) for rank in range(ranks))
    best = min(
        max(sum(s for s, o in zip(sizes, owners) if o == rank) for rank in range(ranks))
        for owners in itertools.product(range(ranks), repeat=len(sizes))
    ) if ranks ** len(sizes) < 10**5 else max(sizes)
    assert best <= largest <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9
    assert largest < sum(sizes) / ranks + max(sizes)
    with pytest.raises(ValueError):
        shares.mine(sizes[:-1])


# --- averages beside the device --------------------------------------------------------------------------------------


def params(dtype=th.float32):
    th.manual_seed(0)
    made = [th.nn.Parameter(th.randn(4, 3, 3, 3, dtype=dtype)), th.nn.Parameter(th.randn(7, dtype=dtype))]
    made[0].data = made[0].data.to(memory_format=th.channels_last)
    return made


def beside(averages):
    """As on a GPU, where copies are folded in by a thread."""
    averages.background = Background(averages.sources)
    return averages


def test_averages_folded_in_beside_the_device_are_the_same_to_the_last_bit():
    ours, plain = params(), params()
    far, near = beside(EMA(ours, ["0.9", "0.5"])), EMA(plain, ["0.9", "0.5"])
    for step in range(5):
        for own in (*ours, *plain):
            own.data.mul_(1.3).add_(step)
        far.update([0.9, 0.5])
        near.update([0.9, 0.5])
        if step == 2:
            far.restart()
            near.restart()
    for a, b in zip(far.local, near.local, strict=True):
        assert all(th.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))
    assert not any(average.requires_grad for average in far.local[0])


def test_training_goes_on_while_an_average_is_folded_in():
    """The average is that of the moment of the update, whatever has become of the parameters since."""
    ours = params()
    averages = beside(EMA(ours, ["0.5"]))
    expected = [0.5 * p.detach() + 0.5 * (p.detach() + 1) for p in ours]
    may_begin, follow = threading.Event(), averages._update

    def slow(decays, values):
        assert may_begin.wait(20)
        follow(decays, values)

    averages._update = slow
    for own in ours:
        own.data.add_(1)
    averages.update([0.5])
    for own in ours:
        own.data.fill_(100)
    assert not averages.background.task.done()
    may_begin.set()
    for average, right in zip(averages.local[0], expected):
        th.testing.assert_close(average, right)


def test_a_failure_beside_the_device_is_heard_of():
    averages = beside(EMA(params(), ["0.5"]))
    averages._update = lambda decays, values: 1 / 0
    averages.update([0.5])
    with pytest.raises(ZeroDivisionError):
        averages.update([0.5])


def test_averages_are_float32_whatever_the_parameters():
    averages = EMA(params(th.bfloat16), ["0.9999"], device="cpu")
    before = averages.local[0][1].clone()
    averages.sources[1].data.add_(1)
    averages.update([0.9999])
    assert averages.local[0][1].dtype == th.float32
    # Half of an ulp of bfloat16 is 2^-9 of a value; this step is smaller.
    assert ((averages.local[0][1] - before) - 1e-4).abs().max() < 2e-6


def test_a_gpu_for_averages_that_is_not_there():
    with pytest.raises(UserError, match="--ema_device cuda, but this run is on the cpu: choose same, or cpu"):
        EMA(params(), ["0.9"], device="cuda")


# --- shares over ranks -----------------------------------------------------------------------------------------------


PROGRAM = """
    import hashlib, json, sys
    from functools import partial
    from pathlib import Path

    sys.path.insert(0, {tests!r})
    import torch as th
    from support.memory_cases import CASES, held_bytes, meta_network
    from support.training import loop

    from cm.distributed import setup as dist
    from cm.data.loader import load_data
    from cm.karras_diffusion import KarrasDenoiser
    from cm.training.memory_estimate import PlannedRun
    from cm.training.memory_estimate import plan
    from cm.samplers import make_sampler
    from cm.generate.engine import SamplingPlan
    from cm.networks.build import create_model
    from cm.training.callbacks import AverageSampler
    from cm.training.callbacks import Evaluation

    COMPANIONS = {{"consistency_training": {{"target_model": "by_objective"}},
                  "progdist": {{"teacher_model": "by_objective"}}}}
    SHARED = dict(shard_ema=True, shard_optimizer=True, ema_device="cpu")

    class Falling:
        key, label, id = "fid", "FID", "falling"

        def __init__(self):
            self.value = 9.0

        def distance(self, batches):
            assert sum(len(images) for _, images in batches) == 2
            self.value -= 1
            return self.value

    def callback():
        make = partial(create_model, 8, 32, 1, "1", class_cond=True, num_classes=3, attention_resolutions="8",
                       num_head_channels=32)
        sampler = AverageSampler(make, KarrasDenoiser(loss_norm="l2"), SamplingPlan(4, 2, 8, 0, 3, -1, "determ"),
                                 "fp32", "0.9", dict(steps=2, sampler=make_sampler("heun", {{}})))
        return Evaluation(sampler, 3, 4, Falling(), {{}})

    def stream(start):
        return load_data(data_dir={images!r}, batch_size=4, image_size=8, class_cond=True, seed=3, start=start,
                         num_workers=0, rank=dist.get_rank(), world_size=2)

    def train(name, folder, steps, **options):
        case = dict(CASES[name])
        if name == "edm":
            case["callbacks"] = [callback()]
        training = loop({images!r}, folder, steps, **{{"data": stream, "batch_size": 4, **case, **options}})
        training.run_loop()
        return training

    def main():
        dist.setup_dist()
        root, said = Path({root!r}), {{}}
        for name in CASES:
            plain = train(name, root / name / "plain", 4)
            shared = train(name, root / name / "shared", 4, **SHARED)
            for first, then in (({{}}, SHARED), (SHARED, {{}})):
                folder = root / name / ("shared first" if first else "plain first")
                train(name, folder, 2, **first)
                train(name, folder, 4, **then)
            for training, flags in ((plain, {{}}), (shared, SHARED)):
                case = CASES[name]
                run = PlannedRun(
                    precision="fp16" if case.get("use_fp16") else "fp32", optimizer=case.get("optimizer", "radam"),
                    ema_rates=["0.5", "0.9"], ranks=2, on_gpu=False,
                    companions=COMPANIONS.get(case.get("mode"), {{}}), **flags)
                planned = plan(meta_network(), run, dist.get_rank()).device
                said[f"{{name}} {{bool(flags)}}"] = [planned, held_bytes(training)]
        # a run of one process goes on here with shares
        train("edm", root / "alone", 4, callbacks=(), **SHARED)
        everybody = dist.all_gather_object(said)
        if dist.is_main():
            (root / "memory.json").write_text(json.dumps(everybody))

    dist.run(main)
"""








@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=pixels, arr_1=np.arange(20) % 3)
    data = str(folder / "images.npz")
    run(data, folder / "alone", 2, **CASES["edm"])
    logger.reset()
    source = PROGRAM.format(tests=str(ROOT / "tests"), images=data, root=str(folder))
    done = mpi_program(folder, 2, source, timeout=240)
    assert done.rc == 0, done
    return folder


def files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.pt") if path.stem.endswith("000004") or path.parent.name == "best"
    }


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["shared", "plain first", "shared first"])
def test_shares_change_no_bit_of_any_file(on_two_ranks, case, way):
    """Nor does it matter when a run begins or ceases to share: at step 2 the other way goes on."""
    plain = files(on_two_ranks / case / "plain")
    assert files(on_two_ranks / case / way) == plain
    assert {"model000004.pt", "opt000004.pt", "ema_0.5_000004.pt", "ema_0.9_000004.pt"} <= plain.keys()
    assert ("best/ema_0.9_000004.pt" in plain) == (case == "edm"), "what a callback keeps of an average in shares"


@pytest.mark.mpi
def test_ranks_may_change_between_stops(on_two_ranks):
    """1 process without shares, 2 ranks with, 1 process without: the curve of a run that nobody stopped."""
    data, folder = str(on_two_ranks / "images.npz"), on_two_ranks / "alone"
    stopped = run(data, folder, 6, **CASES["edm"])
    straight = run(data, on_two_ranks / "straight", 6, **CASES["edm"])
    logger.reset()
    for a, b in zip(straight.trainer.master_params, stopped.trainer.master_params):
        # Sums of gradients are rounded differently; six steps of 1e-3 move a weight by up to 6e-3.
        th.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for a, b in zip(straight.ema_params[1], stopped.ema_params[1]):
        th.testing.assert_close(a, b, rtol=0, atol=1e-5)
    steps = {float(entry["step"]) for entry in stopped.opt.state.values()}
    assert steps == {6.0} and len(stopped.opt.state) == len(stopped.trainer.master_params)


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
def test_the_planned_memory_is_what_each_rank_holds(on_two_ranks, case):
    for rank in json.loads((on_two_ranks / "memory.json").read_text()):
        planned, held = rank[f"{case} False"]
        assert planned == held
        shared, held = rank[f"{case} True"]
        assert shared == held
        total = planned["parameters"] if case == "edm" else planned["float32 masters"]
        for name in ("optimizer", "average 0.9"):
            assert abs(shared[name] / planned[name] - 1 / 2) < 0.05, "half of it, give or take a part of a tensor"
        assert planned["average 0.9"] == total


def test_a_rank_without_a_share_and_a_saved_optimizer_that_does_not_fit():
    owners = partition([3, 2], 2, 3)
    opt = make_optimizer("radam", [th.zeros(3), th.zeros(2)], 0.1, 0.0, owners)
    assert isinstance(opt, ZeroOptimizer) and opt.own == []
    opt.inner.step()
    with pytest.raises(ValueError, match="not one of 2 parameters"):
        opt.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'"):
        make_optimizer("sgd", [th.zeros(3)], 0.1, 0.0)


# --- the plan --------------------------------------------------------------------------------------------------------


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


def test_averages_on_the_host_leave_the_device():
    run_ = PlannedRun("fp32", "adam", ["0.9", "0.99"], ranks=4)
    near, far = plan(meta_network(), run_), plan(meta_network(), PlannedRun(**vars(run_) | {"ema_device": "cpu"}))
    size = near.device["parameters"]
    assert sum(near.device.values()) - sum(far.device.values()) == 2 * size and not near.host
    assert far.host == {"average 0.9": size, "average 0.99": size, "copy for the averages": size}


def test_a_dry_run_says_what_a_rank_will_hold(capsys):
    settings = settings_of("configs/digits/cd.yaml", "--dry_run_ranks", "4", "--shard_ema", "True", "--microbatch", "3",
                           "--ema_rate", "0.9,0.99", "--precision", "fp16")
    config = loop_config(settings)
    assert (config.shard_ema, config.shard_optimizer, config.ema_device) == (True, False, "same"), "as the run itself"
    dry_run(settings)
    said = capsys.readouterr()
    memory, parameters = json.loads(said.out)["memory"], json.loads(said.out)["parameters"]
    assert memory["ranks"] == 4 and memory["images_per_pass"] == 3 and memory["activations_estimate"] > 0
    device = memory["device"]
    assert device["float32 masters"] == 4 * parameters and device["optimizer"] > 8 * parameters
    assert parameters < device["average 0.99"] < 1.2 * parameters, "four bytes each, of a quarter"
    assert device["target"] == device["parameters"] + device["float32 masters"]
    assert device["teacher"] == device["parameters"] < 4 * parameters, "nobody needs the masters of a teacher"
    assert memory["device_total"] == sum(device.values()) and memory["host"] == {}
    for name in (*device, "a checkpoint (disk)", "estimate: 3 images at a time"):
        assert name in said.err


def test_the_table_of_the_docs_is_what_the_command_prints():
    rows = table("ImageNet-64")
    assert len(rows) == 7 and set(rows) <= set((ROOT / "docs" / "memory.md").read_text().splitlines())


def test_going_on_makes_no_second_copy(images, tmp_path):
    """Averages are filled where they are, from the tensors of the file."""
    first = run(images, tmp_path, 1)
    content = state.state_dict(first)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(
        first.trainer.params_in(content["model"]), first.trainer.master_params))
    again = loop(images, tmp_path / "new", 2)
    places = [average.data_ptr() for average in again.ema_params[1]]
    state.load_state_dict(again, manifest.newest(str(tmp_path)))
    assert [average.data_ptr() for average in again.ema_params[1]] == places
    assert all(th.equal(a, b) for a, b in zip(again.ema_params[1], first.ema_params[1]))
