"""Averages of losses by quarter of the noise range."""

import math

import pytest
import torch as th

from cm.training.meters import LossMeter
from cm.types import LossTerms


def meter():
    return LossMeter(0.002, 80.0, lambda tensor: tensor)


def test_quarters_split_the_logarithm_of_the_noise_range():
    width = math.log(80 / 0.002) / 4
    sigma = th.tensor([0.002 * math.exp(width * (q + 0.5)) for q in range(4)] + [1e-6, 1e6, 80.0])
    assert meter().quarter(sigma).tolist() == [0, 1, 2, 3, 0, 3, 3]


def test_means_over_several_batches():
    ours = meter()
    ours.add(LossTerms(th.tensor([1.0, 3.0]), th.tensor([0.003, 70.0]), {"mse": th.tensor([2.0, 4.0])}))
    ours.add(LossTerms(th.tensor([5.0]), th.tensor([0.003])))
    means = ours.means()
    assert means["loss"] == 3 and means["loss_q0"] == 3 and means["loss_q3"] == 3 and means["loss_q1"] is None
    assert means["mse"] == 3 and means["mse_q0"] == 2
    assert ours.means() == {}


def test_sums_of_ranks_add_up():
    ours = LossMeter(0.002, 80.0, lambda tensor: tensor * 2)        # two ranks with the same batch
    ours.add(LossTerms(th.tensor([1.0, 3.0]), th.tensor([0.003, 70.0])))
    assert ours.means()["loss"] == pytest.approx(2)


def test_peaks_are_maxima_over_batches_and_ranks():
    ours = LossMeter(0.002, 80.0, lambda sums: sums, lambda peaks: peaks.clamp(min=4))     # another rank has seen 4
    sigma = th.tensor([0.003, 70.0])
    for values in ([1.0, 9.0], [2.0, 3.0]):
        ours.add(LossTerms(th.ones(2), sigma, {}, {"high": th.tensor(values), "low": th.tensor(values) / 9}))
    means = ours.means()
    assert (means["high"], means["low"]) == (9, 4)
    assert ours.means() == {}
