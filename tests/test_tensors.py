"""Helpers for tensors: shapes that multiply images, means that keep the batch, averages of weights."""

import math

import numpy as np
import pytest
import torch as th
from torch import nn

from cm.networks.layers import (
    without_autocast,
)
from cm.tensors import append_dims, clip_to_pixels, mean_flat, update_ema


def test_append_dims_lets_sigma_multiply_images():
    sigma, images = th.tensor([1.0, 2.0, 3.0]), th.ones(3, 2, 4, 5)
    scaled = append_dims(sigma, images.ndim) * images
    assert scaled.shape == images.shape
    assert scaled[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert append_dims(images, 4).shape == images.shape
    with pytest.raises(ValueError, match="4 of them, target_dims is 3"):
        append_dims(images, 3)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 4, 5)])
def test_mean_flat_keeps_the_batch(shape):
    x = th.randn(shape, dtype=th.float64)
    expected = x.numpy().reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(mean_flat(x).numpy(), expected, rtol=1e-14, atol=1e-15)  # sums of numbers near 1


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.95, 0.9999432189950708, 1.0])
def test_update_ema_against_a_slow_reference(rate):
    th.manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 1, 1)]
    targets, sources = ([th.randn(s) for s in shapes] for _ in range(2))
    expected = [rate * t.double() + (1 - rate) * s.double() for t, s in zip(targets, sources)]
    update_ema(iter(targets), iter(sources), rate)
    for target, value in zip(targets, expected):
        if rate in (0, 1):
            assert th.equal(target.double(), value)
        th.testing.assert_close(target.double(), value, rtol=1e-6, atol=1e-7)    # float32 rounding


def test_update_ema_of_modules_leaves_no_graph_and_takes_half_sources():
    target, source = nn.Linear(3, 3), nn.Linear(3, 3).half()
    before = target.weight.detach().clone()
    update_ema(target.parameters(), source.parameters(), rate=0.9)
    expected = 0.9 * before + 0.1 * source.weight.detach().float()
    th.testing.assert_close(target.weight.detach(), expected)
    assert target.weight.is_leaf and target.weight.requires_grad


def test_update_ema_refuses_what_it_cannot_average():
    with pytest.raises(ValueError, match="2 parameters into 1"):
        update_ema([th.zeros(2)], [th.zeros(2), th.zeros(2)], 0.5)
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            update_ema([th.zeros(2)], [th.zeros(2)], rate)


def test_without_autocast():
    layer, x = nn.Linear(4, 4), th.randn(2, 4)
    with th.autocast("cpu", dtype=th.bfloat16):
        assert layer(x).dtype == th.bfloat16
        with without_autocast(x.device):
            assert layer(x).dtype == th.float32
    with without_autocast(th.device("meta")):
        pass


def test_clipping_keeps_what_is_not_finite_visible():
    values = th.tensor([-3.0, -1.0, 0.25, 2.0, float("inf"), -float("inf"), float("nan")])
    clipped = clip_to_pixels(values)
    assert clipped[:4].tolist() == [-1, -1, 0.25, 1] and clipped[4:].isnan().all()
