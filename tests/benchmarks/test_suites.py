"""The suites of benchmarks/run.py at sizes of a test: what they say they compare is what they run."""

import json
import pickle
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch as th

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from bench import (
    baseline,
    calibration,
    children,
    contestants,
    launches,
    loading,
    objectives,
    peer,
    ranks,
    results,
    sample,
    scale,
    timing,
    train,
)
from bench.ceiling import Ceiling, published_speed
from bench.evaluation import Sizes, eval_suite
from bench.lines import Line, speed_line, table
from bench.network import NetworkSpec

from cm.karras_diffusion import KarrasDenoiser
from support.contestant import make_note

CPU = th.device("cpu")
SPEC = NetworkSpec(8, 32, "1,2", 1, 32, "4", 2)
CEILING = Ceiling({"fp32": 1e11, "bf16": 1e11}, {"fp32": 1e11, "bf16": 1e11})


def test_diffusers_network_is_the_same_function():
    pytest.importorskip("diffusers", reason="no diffusers, which the benchmarks compare with")
    build = pickle.loads(pickle.dumps(peer.peer_of(SPEC)))  # on its way to a process
    ours, theirs = SPEC.build(CPU).eval(), build(CPU).eval()
    x, t = SPEC.images(CPU), th.tensor([-1500.0, 400.0])
    with th.no_grad():
        assert th.allclose(ours(x, t), theirs(x, t), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def in_this_process(makers, device, repeats, plain):
    """Faster than with 15 processes."""
    assert plain == ["plain fp32"]
    return timing.make_and_take_turns(makers, device, repeats)


def test_peers_stand_beside_the_toolkit_in_training_and_sampling(monkeypatch):
    pytest.importorskip("diffusers", reason="no diffusers, which the benchmarks compare with")
    monkeypatch.setattr(train, "PASSES", {"edm": 3})
    for suite in (train, sample):
        monkeypatch.setattr(suite, "take_turns_apart", in_this_process)
    ways = ["plain fp32", "toolkit fp32", "toolkit bf16", "diffusers' network fp32", "diffusers' network bf16"]
    lines = train.train_suite(SPEC, CPU, CEILING, repeats=1)
    assert [line.name for line in lines] == [f"edm, {way}" for way in ways]
    lines = sample.sample_suite(SPEC, CPU, CEILING, repeats=1)
    assert [line.name for line in lines] == [
        f"{sampler}, {way}" for sampler in ("onestep (1 NFE)", "heun (9 NFE)") for way in ways
    ]
    assert all(line.images_per_second > 0 for line in lines)


def test_the_plain_way_has_a_process_without_the_toolkits_settings(tmp_path):
    makers = {name: partial(make_note, name, name != "p", tmp_path / "turns") for name in "pab"}
    times = contestants.take_turns_apart(makers, CPU, 3, plain=["p"])
    assert [len(each.rounds) for each in times.values()] == [3, 3, 3]
    assert (tmp_path / "turns").read_text() == "pab" * (timing.WARM_UP + 3), "in turn, the warm-up too"


def test_a_contestant_that_fails_ends_the_benchmark(tmp_path, capfd):
    makers = {"p": partial(make_note, "p", True, tmp_path / "turns")}
    with pytest.raises(RuntimeError, match="a contestant ended with status 1"):
        contestants.take_turns_apart(makers, CPU, 3, plain=["p"])
    assert "AssertionError" in capfd.readouterr().err


def test_without_diffusers_a_line_says_so(monkeypatch):
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "PASSES", {"edm": 3})
    monkeypatch.setattr(train, "take_turns_apart", in_this_process)
    monkeypatch.setattr(sample, "STEPS", {"onestep": 1})
    lines = sample.sample_suite(SPEC, CPU, CEILING, repeats=1)              # with its processes
    assert "diffusers is not installed" in table(lines) and lines[1].seconds > 0
    assert "diffusers is not installed" in table(train.train_suite(SPEC, CPU, CEILING, repeats=1))


def test_the_plain_way_computes_as_torch_does_by_default(monkeypatch):
    """So a comparison on a GPU does not slow it down; the toolkit's float32 is float32."""
    seen = []
    model, noise = SPEC.build(CPU), SPEC.images(CPU)
    model.register_forward_hook(lambda *_: seen.append(th.backends.cudnn.allow_tf32))
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)
    diffusion = KarrasDenoiser(distillation=True, loss_norm="l2")
    baseline.plain_one_step(diffusion, model, noise)
    baseline.plain_heun(diffusion, model, noise, [2.0, 0.0])
    train.plain_job("edm", SPEC, CPU, noise)()
    assert seen == [True, True] and not th.backends.cudnn.allow_tf32
    sample.toolkit_way(model, diffusion, "onestep", 1, noise.shape, "fp32")
    assert seen[-1] is False


def test_on_a_gpu_one_contestant_is_there_at_a_time(monkeypatch):
    """Five trainings of the ImageNet-64 network do not fit the memory of any."""
    alive, most = [], []

    class Contestant:
        def __init__(self):
            alive.append(self)

        def __call__(self):
            most.append(len(alive))

    monkeypatch.setattr(timing, "wait_for", lambda device: None)
    monkeypatch.setattr(th.cuda, "empty_cache", alive.clear)
    times = timing.make_and_take_turns({name: Contestant for name in "abc"}, th.device("cuda"), 2)
    assert [len(each.rounds) for each in times.values()] == [2, 2, 2] and set(most) == {1}
    timing.make_and_take_turns({name: Contestant for name in "abc"}, CPU, 2)
    assert max(most) == 3


@pytest.mark.parametrize("gpu, speed", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("", None),
    ("Tesla T4", None),
])
def test_mfu_is_of_the_speed_that_the_maker_states(gpu, speed):
    ceiling = replace(CEILING, published=published_speed(gpu))
    line, other = (speed_line("train", "edm", timing.Times((2.0,)), 4, 1e14, ceiling, dtype)
                   for dtype in ("bf16", "fp32"))
    assert line.mfu == (speed and 5e13 / speed) and other.mfu is None
    assert ("MFU" in table([line])) == (speed is not None)


def test_every_objective_has_a_line_and_the_weights_of_its_command():
    """With EDM's weights SA-DPM's loss of DDPM's levels, up to sigma 157, diverges within five steps."""
    lines = objectives.objectives_suite(SPEC, CPU, CEILING, repeats=1)
    assert [line.name for line in lines] == list(objectives.JOBS)
    assert lines[0].note == "1.00 of edm's time, 1.00 of its network passes"
    weights = {
        name: objectives.loop_of(*how[:3], SPEC, CPU, SPEC.images(CPU)).diffusion.weight_schedule
        for name, how in objectives.JOBS.items()
    }
    assert weights.pop("sadpm, 2 steps") == "snr" and set(weights.values()) == {"karras"}


def test_the_evaluation_has_a_line_for_each_part():
    sizes = Sizes(pooled=16, spatial=8, batch=32, points=40, images=1, side=8)
    lines = {line.name: line for line in eval_suite(CPU, 1, sizes)}
    assert list(lines) == [
        "Frechet distance, 16 pooled features", "moments, 16 pooled features", "Frechet distance, 8 spatial features",
        "moments, 8 spatial features", "Inception-v3", "precision and recall, 40 x 40, 16 features",
    ]
    moments = lines["moments, 16 pooled features"]
    assert moments.images_per_second == pytest.approx(32 / moments.seconds)
    assert "50000 x 50000" in lines["precision and recall, 40 x 40, 16 features"].note
    assert lines["Frechet distance, 8 spatial features"].images_per_second is None


def test_the_data_suite_has_the_lines_of_the_benchmark_of_data():
    lines = loading.data_suite(8, count=20, rounds=2, batch=5)
    assert len(lines) == 10 and {line.suite for line in lines} == {"data"}
    assert all(line.images_per_second == pytest.approx(1 / line.seconds) for line in lines)


def test_a_law_is_fitted_by_its_terms_and_names_what_does_not_follow():
    measured = {8: 1.0 + 8 * 0.5, 16: 1.0 + 16 * 0.5, 64: 1.0 + 64 * 0.5}
    assert scale.fit(measured, scale.with_a_part_for_each) == pytest.approx(measured)
    least = (1 / 0.9 + 1 / 1.1) / (1 / 0.9**2 + 1 / 1.1**2)
    assert scale.fit({1: 0.9, 2: 1.1}, scale.constant)[1] == pytest.approx(least)
    assert scale.deviation(1.05, 1.0) == "+5% of its law"
    assert scale.deviation(0.8, 1.0) == "-20%, outside 10 %, of its law"


def test_every_axis_makes_a_step_and_its_point_is_measured_in_a_child(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "SMALL", SPEC)
    monkeypatch.setattr(scale, "AXES", {
        name: replace(axis, values=(8, 16) if name == "image side" else axis.values[:2])
        for name, axis in scale.AXES.items()
    })
    monkeypatch.setattr(scale, "peak_in_child", lambda *order, device: float(order[-1]))
    monkeypatch.setattr(scale.ranks, "rank_lines", lambda device, repeats: [])
    lines = scale.scale_suite(CPU, 1, tmp_path)
    assert len(lines) == 2 * len(scale.AXES) and all(line.seconds > 0 for line in lines)
    assert {path.name for path in tmp_path.iterdir()} >= {"batch_seconds.png", "stfs_references_peak.png"}


def test_memory_of_a_job_is_measured_in_a_process_of_its_own():
    """An axis' point, made by the child from its name: one float32 average more is one network more."""
    peak = {n: children.peak_in_child("bench.scale", "point", "weight averages", n, device=CPU) for n in (1, 16)}
    network = sum(param.nbytes for param in scale.SMALL.build(CPU).parameters()) / 2**20
    assert 10 * network < peak[16] - peak[1] < 20 * network


@pytest.mark.parametrize("started", [ranks.time_a_rank, calibration.time_a_rank, children.print_peak])
def test_a_measurement_of_the_cpu_takes_no_gpu(started, monkeypatch):
    """On a machine with GPUs, of which there are fewer than cores."""
    class Begun(Exception):
        pass

    def setup_dist(timeout_s=0, device=None):
        assert device == "cpu"
        raise Begun

    monkeypatch.setattr(children.dist, "setup_dist", setup_dist)
    monkeypatch.setattr(children.dist, "run", lambda main: main())
    order = (json.dumps(["bench.memory", "step", [], "cpu", False]),) if started is children.print_peak else ()
    with pytest.raises(Begun):
        started(*({ranks.time_a_rank: (2, 1)}.get(started, order)))


def test_a_suite_that_is_measured_again_leaves_the_others(tmp_path):
    results.keep(tmp_path, "train", [Line("train", "old", 1.0)], CPU, CEILING)
    results.keep(tmp_path, "sample", [Line("sample", "other", None, peak_mib=3.0)], CPU, CEILING)
    results.keep(tmp_path, "train", [Line("train", "new", 2.0, share_of_gemm=0.5)], CPU, CEILING)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| new | 2 | 50% |" in page and "| other | 3 |" in page and "old" not in page
    assert page.count("## On ") == 1, "one machine"
    assert "fp32: GEMM 100, 3x3 convolution 100" in page


def test_launches_are_operations_that_compute():
    """Views and empty memory are free, a list of tensors is one, what lies on the CPU is none."""
    x = th.empty(4, 4, device="meta")
    with launches.LaunchCounter() as counter:
        (x.t().reshape(2, 8) + 1).mul_(2)
        th._foreach_mul_([x, x.clone()], 2)
        x.sum().item()
        th.ones(3) + 1
    # Two copies, one of them for reshape; a sum, two products, and a number that is waited for.
    assert counter.names.total() == 7 and counter.names["_foreach_mul_"] == 1


def test_a_step_is_given_to_the_device_in_few_operations():
    plain, own = launches.training_lines("consistency_training", "fp32", SPEC)
    assert own.launches_over_plain == own.launches / plain.launches <= 0.6
    rest = int(own.note.split()[-4])
    assert 0 < rest < 100, "optimizer, averages and norms, whatever the number of parameters"


def test_a_convolution_counts_what_torch_does_around_it():
    weight, bias = th.empty(8, 4, 3, 3, device="meta"), th.empty(8, device="meta")
    last = {"memory_format": th.channels_last}
    for x, w, copies in ((th.empty(2, 4, 6, 6, device="meta"), weight, 0),
                         (th.empty(2, 4, 6, 6, device="meta"), weight.to(**last), 1),
                         (th.empty(2, 4, 6, 6, device="meta", **last), weight.to(**last), 0)):
        with launches.LaunchCounter() as counter:
            th.conv2d(x, w, bias)
        assert counter.names.total() == 2 + copies and counter.names["copy for convolution"] == copies


def test_no_layer_of_a_block_copies_its_input():
    """The image is copied for the first convolution, and the result of that one for the first norm."""
    plain, own = launches.one_step(SPEC)
    assert own["clone"] + own["copy for convolution"] <= 2
    assert own.total() < 0.8 * plain.total()


def test_calls_of_generated_code():
    code = """
        empty = empty_strided_cpu((2, 3), (3, 1), torch.float32)
        extern_kernels.addmm(arg1, arg2, reinterpret_tensor(arg3, (2, 3), (1, 2), 0), alpha=1, beta=1, out=buf0)
        # Topologically Sorted Source Nodes: [silu], Original ATen: [torch.ops.aten.silu.default]
        cpp_fused_silu_0(buf0, buf1)
        buf2 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(buf1, buf1, buf1)
        assert_size_stride(buf2, (2, 3), (3, 1), 'torch.ops.aten.mm.default')
        buf3 = extern_kernels.convolution(buf2, arg4, arg5, stride=(1, 1))
        del buf2
        return (buf3, )
    """
    assert sum(bool(launches.CALL.match(line)) for line in code.splitlines()) == 4


def test_launches_have_a_line_for_every_way(monkeypatch):
    monkeypatch.setattr(launches, "launches_of", lambda step, *args, **options: Counter(x=10))
    monkeypatch.setattr(launches, "compiled_pass", lambda spec: 5)
    lines = launches.launches_suite(SPEC)
    assert len(lines) == 3 * 2 * 2 + 2 * 2 + 1 + len(objectives.JOBS)
    assert [line.launches_over_plain for line in lines[:17]] == [None, 1] * 7 + [1.5] + [None, 1]
    assert all(line.launches == 10 for line in lines if line.launches_over_plain != 1.5)
    assert "operations / plain" in table(lines)
