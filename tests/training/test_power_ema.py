"""Power-function averages: exponents and decay of the paper, and combinations against averages tracked step by step."""

import math

import numpy as np
import pytest

from cm.errors import UserError
from cm.training.power_ema import Profile, decay, gamma_of, mix, overlap


def test_exponents_of_widths():
    assert [round(gamma_of(std), 4) for std in (0.05, 0.10, 0.25)] == [16.9722, 6.9372, 0.7198]
    for std in (0.01, 0.05, 0.13, 0.2, 0.28):
        gamma = gamma_of(std)
        width = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))          # EDM2, equation 123
        assert width == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.289, 1.0, math.nan])
def test_what_is_no_width(std):
    with pytest.raises(UserError, match="is not a width of a power-function average: it must be above 0 and below"):
        gamma_of(std)


@pytest.mark.parametrize("std", [0.05, 0.2])
def test_the_profile_of_many_steps_has_the_width_and_the_sum_of_its_definition(std):
    """2000 steps: the mean and the width of a sum differ from those of the integral by about a step."""
    steps, weights = 2000, np.zeros(2000)
    for step in range(1, steps + 1):
        beta = decay(step * 32, 32, std)
        weights *= beta
        weights[step - 1] = 1 - beta
    place, gamma = np.arange(1, steps + 1) / steps, gamma_of(std)
    assert weights.sum() == pytest.approx(1) and decay(32, 32, std) == 0
    mean = weights @ place
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    assert math.sqrt(weights @ (place - mean) ** 2) == pytest.approx(std, rel=2e-3)


@pytest.mark.parametrize("a, b", [((100, 0.05), (70, 0.1)), ((70, 0.1), (100, 0.05)), ((50, 0.2), (50, 0.07))])
def test_overlaps_are_integrals(a, b):
    tau = (np.arange(200_000) + 0.5) / 200_000 * 100

    def density(images, std):
        gamma = gamma_of(std)
        return np.where(tau < images, (gamma + 1) * tau**gamma / images ** (gamma + 1), 0)

    expected = (density(*a) * density(*b)).mean() * 100
    assert overlap(Profile.of(*a), Profile.of(*b)) == pytest.approx(expected, rel=1e-4)


# --- a path of 64 weights over 4000 steps, and its averages, tracked one step at a time -------------------------------

STEPS = 4000


def path():
    rng = np.random.default_rng(1)
    walk = np.cumsum(rng.normal(size=(STEPS, 64)), 0) * 0.02
    return walk + 3 * np.exp(-np.arange(STEPS) / 400)[:, None] * rng.normal(size=64)


def track(std):
    """The average after each step, [STEPS+1,64]."""
    average, found, gamma = np.zeros(64), [np.zeros(64)], gamma_of(std)
    for step, weights in enumerate(path(), 1):
        beta = (1 - 1 / step) ** (gamma + 1)
        average = beta * average + (1 - beta) * weights
        found.append(average)
    return np.stack(found)


@pytest.fixture(scope="module")
def tracked():
    return {std: track(std) for std in (0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25)}


# Snapshots of each of two widths -> width -> largest error.
MEASURED = {
    20: {0.07: 1.6e-4, 0.15: 4.5e-4, 0.03: 2.5e-3, 0.20: 4e-3, 0.25: 4e-2},
    50: {0.07: 1.1e-5, 0.15: 2e-5, 0.03: 1.7e-4, 0.20: 5e-4, 0.25: 1e-2},
    100: {0.07: 1e-6, 0.15: 2e-6, 0.03: 2e-5, 0.20: 9e-5, 0.25: 4e-3},
}


@pytest.mark.parametrize("count", MEASURED)
def test_any_width_is_made_as_exactly_as_measured(tracked, count):
    """The path differs from an average of it by up to 0.91."""
    assert np.abs(path()[-1] - tracked[0.10][STEPS]).max() == pytest.approx(0.91, abs=0.01)
    kept = [(step, std) for step in range(STEPS // count, STEPS + 1, STEPS // count) for std in (0.05, 0.10)]
    profiles, averages = [Profile.of(*each) for each in kept], np.stack([tracked[std][step] for step, std in kept])
    for std, expected in MEASURED[count].items():
        made = mix(profiles, Profile.of(STEPS, std))
        error = np.abs(made.coefficients @ averages - tracked[std][STEPS]).max()
        assert expected / 2 < error < expected * 2, (std, error)
        assert made.coefficients.sum() == pytest.approx(1)
    for std in (0.05, 0.10):
        np.testing.assert_allclose(mix(profiles, Profile.of(STEPS, std)).coefficients @ averages, tracked[std][STEPS],
                                   rtol=0, atol=1e-9)


def test_an_earlier_time_takes_the_snapshots_until_then(tracked):
    kept = [(step, std) for step in range(100, 2001, 100) for std in (0.05, 0.10)]
    made = mix([Profile.of(*each) for each in kept], Profile.of(2000, 0.07))
    averages = np.stack([tracked[std][step] for step, std in kept])
    assert np.abs(made.coefficients @ averages - tracked[0.07][2000]).max() < 1e-3


@pytest.mark.parametrize("count, std", [(20, 0.02), (20, 0.25), (100, 0.25), (50, 0.07)])
def test_the_error_of_a_profile_is_its_distance_from_the_one_asked_for(count, std):
    """By quadrature; the smallest of the four is 4e-4 and needs fine steps at the end, where the profiles are steep."""
    kept = [Profile.of((i + 1) / count, each) for i in range(count) for each in (0.05, 0.10)]
    target = Profile.of(1.0, std)
    made = mix(kept, target)
    tau = (np.arange(400_000) + 0.5) / 400_000

    def density(profile):
        return np.where(tau < profile.images, (profile.gamma + 1) / profile.images
                        * (tau / profile.images) ** profile.gamma, 0)

    gap = sum(x * density(each) for x, each in zip(made.coefficients, kept)) - density(target)
    expected = math.sqrt((gap**2).mean() / (density(target) ** 2).mean())
    assert made.error == pytest.approx(expected, rel=0.02)


def test_snapshots_that_determine_nothing():
    with pytest.raises(UserError, match="there are no snapshots"):
        mix([], Profile.of(1, 0.05))
    with pytest.raises(UserError, match="two of them have the same step and width"):
        mix([Profile.of(1, 0.05)] * 2, Profile.of(1, 0.05))
