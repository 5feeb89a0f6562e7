"""Sharing stages changes no image, and saves what it promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch as th

from cm.generate.engine import SamplingPlan, draw, labels_of, rank_batches
from cm.generate.prefix_cache import PrefixCache
from cm.generate.schedule_search import naive_evaluations, read_range, search_schedule
from cm.karras_diffusion import KarrasDenoiser
from cm.samplers.sample import SampleOptions
from support.naive import naive_search

PLAN = SamplingPlan(num_samples=7, batch_size=3, image_size=4, seed=1, num_classes=5)
OPTIONS = SampleOptions(40, "multistep")
STAGE_BYTES = 7 * 3 * 4 * 4 * 4                                     # the images of one stage in float32


class Network(th.nn.Module):
    """Mixes pixels and channels, knows time and class, and counts the images it sees."""

    def __init__(self):
        super().__init__()
        th.manual_seed(0)
        self.conv, self.table = th.nn.Conv2d(3, 3, 3, padding=1), th.nn.Embedding(5, 3)
        self.seen = 0

    def forward(self, x, time, y):
        self.seen += len(x)
        return th.tanh(self.conv(x) + self.table(y)[:, :, None, None] + time[:, None, None, None] / 1000)


def images(network, denoiser_of, ts):
    """All images of a schedule: [7,4,4,3]."""
    batches = [
        draw(network, denoiser_of(batch), PLAN, indices, labels_of(indices, PLAN), replace(OPTIONS, ts=ts))[0]
        for batch, indices in enumerate(rank_batches(PLAN, 0, 1))
    ]
    return np.concatenate(batches)


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def diffusion():
    return KarrasDenoiser(distillation=True)


def test_images_are_those_of_plain_sampling_bit_for_bit(network, diffusion):
    stages = PrefixCache(diffusion, 10 * STAGE_BYTES)
    for shared in ([(0,)], [(0,), (0, 9)], [(0, 9), (0, 9, 20)], [(0, 5)]):
        stages.share(shared)
        for ts in [(0, 39), (0, 9, 39), (0, 5, 9, 39), (0, 9, 20, 39), (0, 9, 20, 30, 39), (0, 9, 25, 39)]:
            for _ in range(2):
                ours = images(network, lambda batch, ts=ts: stages.denoiser(ts, batch), ts)
                assert np.array_equal(ours, images(network, lambda batch: diffusion, ts))


def test_a_shared_stage_is_evaluated_once(network, diffusion):
    stages = PrefixCache(diffusion, 10 * STAGE_BYTES)
    stages.share([(0,), (0, 9)])
    taken = []
    for ts in [(0, 39), (0, 9, 39), (0, 9, 20, 39), (0, 9, 25, 39), (0, 5, 9, 39), (0, 5, 9, 39)]:
        before = network.seen
        images(network, lambda batch, ts=ts: stages.denoiser(ts, batch), ts)
        taken.append((network.seen - before) // 7)
    assert taken == [1, 1, 1, 1, 2, 2]
    assert stages.evaluations == network.seen


@pytest.mark.parametrize("room, held", [(0, 0), (STAGE_BYTES - 1, 6), (STAGE_BYTES, 7), (STAGE_BYTES // 2, 3)])
def test_memory_is_bounded_and_what_does_not_fit_is_evaluated_again(network, diffusion, room, held):
    stages = PrefixCache(diffusion, room)
    stages.share([(0,)])
    ts = (0, 9, 39)
    for _ in range(2):
        ours = images(network, lambda batch: stages.denoiser(ts, batch), ts)
        assert stages.free_bytes >= 0
    assert network.seen == 2 * 14 - held
    assert bool(stages.not_held) == (held < 7)
    assert np.array_equal(ours, images(network, lambda batch: diffusion, ts))


def test_forgotten_stages_give_their_memory_back(network, diffusion):
    stages = PrefixCache(diffusion, 2 * STAGE_BYTES)
    for shared in ([(0,), (0, 9)], [(0,), (0, 11)], [(0,), (0, 11)]):
        stages.share(shared)
        images(network, lambda batch: stages.denoiser((*shared[1], 39), batch), (*shared[1], 39))  # noqa: B023 (used now)
        assert (stages.free_bytes, stages.not_held) == (0, 0)
    stages.share([])
    assert stages.free_bytes == 2 * STAGE_BYTES


def test_a_search_takes_half_of_the_evaluations_of_a_naive_one(network, diffusion):
    """Both run for real, on a score with one valley, and the network counts."""
    def score(ts):
        return (ts[1] - 13) ** 2

    def shared_score(ts):
        if ts not in seen:
            images(network, lambda batch: stages.denoiser(ts, batch), ts)
            seen[ts] = score(ts) if len(ts) > 2 else 1000.0
        return seen[ts]

    def naive_score(point):
        images(network, lambda batch: diffusion, (0, point, 39))
        return score((0, point, 39))

    stages, seen, space = PrefixCache(diffusion, 10 * STAGE_BYTES), {}, read_range("0", "39", 40, 1)
    found = list(search_schedule(shared_score, space, 1, stages.share))
    ours, network.seen = network.seen, 0
    assert found[0].point == naive_search(naive_score, 1, 38) == 13
    assert network.seen == 7 * naive_evaluations(space, found)
    assert ours <= 7 * 9 and 2 * ours <= network.seen
