"""The model of training on many GPUs: its parts against closed forms and an exact simulation, and the page's tables."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch as th

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import scaling as command
from bench import calibration, scaling
from bench.scaling import ADM64, ENGINES, GPUS, SAVES, XXL, Cluster, step

from cm.script_util import create_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"
IDEAL = Cluster(half_flops=0.0, latency=0.0, bus=1e30, network=1e30, memory_rate=1e30)
WORK = replace(ADM64, batch=1024)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_network_to_cross_twice_the_gpus_take_half_the_time(engine):
    times = [step(WORK, IDEAL, n, engine).seconds for n in GPUS]
    flops = 3 * WORK.flops * WORK.batch                     # forward, and twice that backward
    np.testing.assert_allclose(times, [flops / (n * IDEAL.flops * IDEAL.utilisation) for n in GPUS], rtol=1e-9)
    assert scaling.efficiency(WORK, IDEAL, 512, engine) == pytest.approx(1, rel=1e-9)


def ring(ranks, size, rate):
    """An all-reduce round by round: in each, every rank passes one of `ranks` pieces on to the next."""
    values = [[[rank] for _ in range(ranks)] for rank in range(ranks)]
    seconds = 0.0
    for turn in range(2 * (ranks - 1)):
        sent = [(rank, (rank - turn) % ranks, values[rank][(rank - turn) % ranks]) for rank in range(ranks)]
        for rank, piece, content in sent:
            to = (rank + 1) % ranks
            values[to][piece] = values[to][piece] + content if turn < ranks - 1 else content
        seconds += size / ranks / rate
    assert all(sorted(piece) == list(range(ranks)) for rank in values for piece in rank)
    return seconds


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_an_all_reduce_takes_what_a_ring_takes(ranks):
    assert scaling.all_reduce(1e9, ranks, 5e9, 0.0) == pytest.approx(ring(ranks, 1e9, 5e9))


def test_one_rank_sends_nothing():
    assert scaling.all_reduce(1e9, 1, 1.0, 1.0) == scaling.agreement(Cluster(), 1) == 0


def test_memory_is_what_the_engines_divide():
    cluster = Cluster(memory=1e12)
    weights, images = 4 * WORK.parameters, WORK.batch / 64 * WORK.activations
    held = {engine: step(WORK, cluster, 64, engine).memory - images for engine in ENGINES}
    assert held["ddp"] == pytest.approx(weights * (4 + 2 / 64))     # weights, gradients, two averages; two moments
    assert held["hsdp"] == pytest.approx(weights * 6 / 8) and held["fsdp"] == pytest.approx(weights * 6 / 64)


def simulated_goodput(stall, between, interval, restart, seed=0):
    """Share of useful time of a run that is saved every `interval` and struck by failures at random."""
    rng, clock, saved = np.random.default_rng(seed), 0.0, 0.0
    next_failure = rng.exponential(between)
    while clock < 4_000 * between:                          # failures enough for a share that is known to 0.002
        round_ends = clock + interval + stall
        if round_ends <= next_failure:
            clock, saved = round_ends, saved + interval
        else:                                               # what was made since the last save is lost
            clock = next_failure + restart
            next_failure = clock + rng.exponential(between)
    return saved / clock


@pytest.mark.parametrize("save", SAVES)
def test_goodput_agrees_with_a_simulation_of_failures(save):
    cluster = Cluster(failure_hours=2_000.0, shortest_interval=0.0)         # bad times: the losses can be seen
    stall, between = scaling.save_stall(XXL, cluster, 512, save), scaling.failure_interval(cluster, 512)
    interval = scaling.save_interval(XXL, cluster, 512, save)
    restart = cluster.restart + scaling.checkpoint_bytes(XXL) / cluster.writes
    simulated = simulated_goodput(stall, between, interval, restart)
    assert scaling.goodput(XXL, cluster, 512, save) == pytest.approx(simulated, abs=0.01)
    assert all(simulated_goodput(stall, between, other, restart) < simulated + 1e-3
               for other in (interval / 3, interval * 3))


def test_the_sizes_are_those_of_the_networks():
    with th.device("meta"):
        adm = create_model(64, 192, 3, channel_mult="1,2,3,4", attention_resolutions="32,16,8", num_head_channels=64,
                           resblock_updown=True, use_scale_shift_norm=True, class_cond=True)
        xxl = create_model(64, 448, 3, "1,2,3,4", arch="edm2", attention_resolutions="16,8", channels=4,
                           class_cond=True, num_classes=1000)
    for model, work in ((adm, ADM64), (xxl, XXL)):
        assert sum(param.numel() for param in model.parameters()) == work.parameters


def test_what_limits_the_speed_first():
    """The sentences of the page that compare rows of its tables."""
    cluster = Cluster()
    at_most = {engine: step(XXL, cluster, 512, engine) for engine in ENGINES}
    assert all(scaling.limit(parts) == "communication" for parts in at_most.values())
    ddp = at_most["ddp"]
    assert ddp.update > 0.1 * ddp.seconds > at_most["fsdp"].update
    assert step(XXL, replace(cluster, network=1e30), 512, "hsdp").exposed < 0.1 * at_most["hsdp"].exposed
    assert step(XXL, replace(cluster, latency=0.0), 512, "fsdp").exposed < 0.1 * at_most["fsdp"].exposed
    fewest, most = (1e3 * step(work, cluster, 512, "fsdp").compute for work in (ADM64, XXL))
    assert f"computes for {fewest:.0f} to {most:.0f} milliseconds" in " ".join(PAGE.read_text().split())
    one, shared, background = (1 - scaling.goodput(XXL, cluster, 512, save) for save in SAVES)
    assert one > 3 * shared and shared < 1.5 * background
    larger = replace(XXL, batch=4 * XXL.batch)
    assert scaling.efficiency(larger, cluster, 512) > 1.5 * scaling.efficiency(XXL, cluster, 512)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="choose one of ddp, hsdp, fsdp"):
        step(WORK, Cluster(), 8, "pipeline")
    with pytest.raises(ValueError, match="each needs at least one"):
        step(WORK, Cluster(), 2048)
    with pytest.raises(ValueError, match="leaves no room"):
        step(XXL, Cluster(memory=24e9), 8)
    with pytest.raises(ValueError, match="choose one of one writer"):
        scaling.save_stall(XXL, Cluster(), 8, "tape")


def test_the_fit_finds_rate_and_latency():
    seconds = {size: scaling.all_reduce(size, 4, 2e9, 3e-5) for size in calibration.SIZES}
    assert calibration.fit(seconds, 4) == pytest.approx((3e-5, 2e9))


def test_the_page_shows_what_was_measured_here():
    measured = json.loads((ROOT / "benchmarks" / "scaling_cpu.json").read_text())
    page = PAGE.read_text()
    assert all(row in page.splitlines() for row in calibration.rows(measured))
    longer = [measured["ranks"][n]["step"] / measured["ranks"][n]["step_predicted"] - 1 for n in ("2", "4")]
    assert f"a step takes {100 * longer[0]:.0f} %" in page and f"a step {100 * longer[1]:.0f} % longer" in page


def test_the_page_shows_the_tables_of_the_model():
    page = set(PAGE.read_text().splitlines())
    for work in (ADM64, XXL):
        missing = [row for row in [*command.step_rows(work), *command.save_rows(work)] if row not in page]
        assert not missing, "\n".join(missing)
