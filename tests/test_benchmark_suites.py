"""The suites of benchmarks/run.py at sizes of a test: what they say they compare is what they run."""

import sys
from pathlib import Path

import pytest
import torch as th

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from bench import loading, peer, sample, train
from bench.ceiling import Ceiling
from bench.evaluation import Sizes, eval_suite
from bench.lines import table
from bench.network import NetworkSpec

CPU = th.device("cpu")
SPEC = NetworkSpec(8, 32, "1,2", 1, 32, "4", 2)
CEILING = Ceiling({"fp32": 1e11, "bf16": 1e11}, {"fp32": 1e11, "bf16": 1e11})


def test_diffusers_network_is_the_same_function():
    pytest.importorskip("diffusers")
    ours, theirs = SPEC.build(CPU).eval(), peer.peer_of(SPEC)(CPU).eval()
    x, t = SPEC.images(CPU), th.tensor([-1500.0, 400.0])
    with th.no_grad():
        assert th.allclose(ours(x, t), theirs(x, t), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_peers_stand_beside_the_toolkit_in_training_and_sampling(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(train, "PASSES", {"edm": 3})
    ways = ["plain fp32", "toolkit fp32", "toolkit bf16", "diffusers' network fp32", "diffusers' network bf16"]
    lines = train.train_suite(SPEC, CPU, CEILING, repeats=1)
    assert [line.name for line in lines] == [f"edm, {way}" for way in ways]
    lines = sample.sample_suite(SPEC, CPU, CEILING, repeats=1)
    assert [line.name for line in lines] == [
        f"{sampler}, {way}" for sampler in ("onestep (1 NFE)", "heun (9 NFE)") for way in ways
    ]
    assert all(line.images_per_second > 0 for line in lines)


def test_without_diffusers_a_line_says_so(monkeypatch):
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "PASSES", {"edm": 3})
    assert "diffusers is not installed" in table(train.train_suite(SPEC, CPU, CEILING, repeats=1))


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
