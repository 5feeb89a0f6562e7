"""Weights by noise level from past losses."""

import math

import pytest
import torch as th

from cm.objectives.noise_bins import BINS, MEMORY, NoiseBinWeights


def test_a_weight_is_the_inverse_of_the_mean_loss_of_its_bin():
    weights, sigma = NoiseBinWeights(0.002, 80), th.tensor([0.002, 0.5, 80.0, 1e9])
    assert weights.bins(sigma).tolist() == [0, math.floor(math.log(250) / math.log(40_000) * BINS), BINS - 1, BINS - 1]
    assert weights.weight(sigma).tolist() == [1, 1, 1, 1]
    often = 20 * MEMORY
    weights.update_loss_history(th.tensor([0.5, 80.0]).repeat(often), th.tensor([2.0, 0.25]).repeat(often))
    assert weights.weight(sigma).tolist() == pytest.approx([1, 0.5, 4, 4], rel=1e-6)


def test_the_mean_begins_at_one_and_forgets():
    weights = NoiseBinWeights(0.002, 80)
    sigma = th.full((MEMORY // 2,), 0.5)
    weights.update_loss_history(sigma, th.zeros(MEMORY // 2))       # a student that is still its teacher
    assert 1 / weights.weight(sigma[:1]).item() == pytest.approx((1 - 1 / MEMORY) ** (MEMORY // 2), rel=1e-5)


def test_a_checkpoint_restores_them():
    weights, other = NoiseBinWeights(0.002, 80), NoiseBinWeights(0.002, 80)
    weights.update_loss_history(th.tensor([0.5, 3.0]), th.tensor([2.0, 5.0]))
    other.load_state_dict(weights.state_dict())
    sigma = th.tensor([0.01, 0.5, 3.0])
    assert th.equal(other.weight(sigma), weights.weight(sigma)) and other.weight(sigma)[1] < 1
