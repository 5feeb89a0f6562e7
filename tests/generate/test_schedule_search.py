"""The search of multistep schedules, over made-up scores: right wherever the valley lies, and sparing."""

import math
import random
from itertools import combinations, pairwise

import pytest

from cm.errors import UserError
from cm.generate.schedule_search import (
    SearchRange,
    best_schedule,
    naive_evaluations,
    read_range,
    search_schedule,
    ternary_search,
    textbook_scores,
)
from support.naive import naive_search


class Counting:
    """A score that remembers what it was asked for."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, argument):
        self.asked.append(argument)
        return self.function(argument)


VALLEYS = {
    "equal slopes": lambda p, bottom: abs(p - bottom),
    "steep on the left": lambda p, bottom: 10 * (bottom - p) if p < bottom else (p - bottom) / 10,
    "steep on the right": lambda p, bottom: (bottom - p) / 10 if p < bottom else 10 * (p - bottom),
    "saturating": lambda p, bottom: 1 - math.exp(-((p - bottom) ** 2) / 1000),
    "huge": lambda p, bottom: 1e9 + (p - bottom) ** 2,
}


@pytest.mark.parametrize("name", VALLEYS)
@pytest.mark.parametrize("bottom", range(40))
def test_finds_the_bottom_wherever_it_lies(name, bottom):
    score = Counting(lambda p: VALLEYS[name](p, bottom))
    assert ternary_search(score, 0, 39) == bottom
    assert len(set(score.asked)) == len(score.asked) <= 8, "each index once, and few of them"
    assert all(0 <= p <= 39 for p in score.asked)


@pytest.mark.parametrize("low, high", [(low, low + width) for low in (0, 5) for width in range(13)])
def test_every_small_interval(low, high):
    for bottom in range(low, high + 1):
        score = Counting(lambda p, bottom=bottom: abs(p - bottom))
        assert ternary_search(score, low, high) == bottom
        assert set(score.asked) <= set(range(low, high + 1))


def test_scores_beyond_the_interval_are_never_asked_for():
    for bottom in (-5, 50):                                         # falling towards an end, like a valley outside
        assert ternary_search(lambda p, bottom=bottom: abs(p - bottom), 3, 31) == (3 if bottom < 3 else 31)


def test_a_flat_bottom_of_two_gives_one_of_them():
    for bottom in range(39):
        assert ternary_search(lambda p, bottom=bottom: abs(p - bottom - 0.5), 0, 39) in (bottom, bottom + 1)


def test_without_one_valley_the_answer_is_the_best_that_was_scored():
    for seed in range(200):
        heights = random.Random(seed).choices(range(30), k=40)
        score = Counting(heights.__getitem__)
        found = ternary_search(score, 0, 39)
        assert found in score.asked
        assert heights[found] == min(heights[p] for p in score.asked)


def test_an_empty_interval_is_an_error():
    with pytest.raises(ValueError, match="at least one index, got 3 to 2"):
        ternary_search(abs, 3, 2)


# --- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin, end, steps, expected", [
    ("0", "39", 40, SearchRange((0, 39), 1, 38)),
    ("0,10", "39", 40, SearchRange((0, 10, 39), 11, 38)),
    ("0", "20,39", 40, SearchRange((0, 20, 39), 1, 19)),
    ("0, 5", "20,30,39", 40, SearchRange((0, 5, 20, 30, 39), 6, 19)),
    ("0", "3", 40, SearchRange((0, 39), 1, 3)),                     # a limit, itself allowed
    ("0", "2", 40, SearchRange((0, 39), 1, 2)),
    ("0", "1", 40, SearchRange((0, 39), 1, 1)),
    ("0", "2", 3, SearchRange((0, 2), 1, 1)),
])
def test_begin_and_end(begin, end, steps, expected):
    assert read_range(begin, end, steps, 1) == expected


@pytest.mark.parametrize("begin, end, steps, num_ts, message", [
    ("0", "1", 2, 1, "0 more points fit, and --num_ts asks for 1"),
    ("0", "39", 40, 39, "38 more points fit, and --num_ts asks for 39"),
    ("5", "39", 40, 1, "--begin must start at 0"),
    ("0,9", "9", 40, 1, "must rise"),
    ("0,30", "20", 40, 1, "must rise"),
    ("0,9,4", "39", 40, 1, "must rise"),
    ("0", "40", 40, 1, "the noise levels are 0 to 39"),
    ("0", "20,30", 40, 1, "closed by steps-1 = 39"),
    ("", "39", 40, 1, "--begin '' is not a list of indices"),
    ("0", "thirty", 40, 1, "--end 'thirty' is not a list of indices"),
    ("-1", "39", 40, 1, "--begin '-1' is not a list of indices"),
])
def test_wrong_begin_or_end(begin, end, steps, num_ts, message):
    with pytest.raises(UserError, match=message):
        read_range(begin, end, steps, num_ts)


def ideal(ts, targets=(9, 21, 33)):
    """How far a schedule is from serving each target."""
    return sum(min(abs(target - p) for p in ts) for target in targets)


def slow_greedy(score, ts, num_ts):
    """Every index tried, every time."""
    for _ in range(num_ts):
        ts = min((tuple(sorted((*ts, p))) for p in range(1, 39) if p not in ts), key=score)
    return ts


@pytest.mark.parametrize("num_ts", [1, 2, 3])
@pytest.mark.parametrize("power", [0.3, 0.7, 1.1, 2, 4])
def test_greedy_search_equals_trying_everything(num_ts, power):
    def score(ts):                                                  # convex in each new point's p^power: one valley
        return sum((b**power - a**power) ** 2 for a, b in pairwise(ts))

    rounds = list(search_schedule(score, read_range("0", "39", 40, num_ts), num_ts))
    assert [len(r.ts) for r in rounds] == list(range(3, 3 + num_ts))
    assert rounds[-1].ts == slow_greedy(score, (0, 39), num_ts)
    assert rounds[-1].score == score(rounds[-1].ts)


def test_rounds_hang_together():
    score = Counting(ideal)
    rounds = list(search_schedule(score, read_range("0", "39", 40, 3), 3))
    for one, two in zip(rounds, rounds[1:]):
        assert (two.before, two.before_score) == (one.ts, one.score)
    for r in rounds:
        assert r.ts == tuple(sorted((*r.before, r.point)))
        assert r.tried[r.point] == r.score == min(r.tried.values()) == ideal(r.ts)
        assert r.ts in score.asked and list(r.tried) == sorted(r.tried)


def test_given_points_stay_and_limits_hold():
    for begin, end in [("0,10", "30,39"), ("0", "12"), ("0,35", "39")]:
        space = read_range(begin, end, 40, 2)
        found = list(search_schedule(ideal, space, 2))[-1].ts
        new = set(found) - set(space.ts)
        assert set(space.ts) <= set(found) and len(new) == 2
        assert all(space.low <= p <= space.high for p in new)


def test_all_room_can_be_filled():
    rounds = list(search_schedule(ideal, read_range("0", "5", 6, 4), 4))
    assert rounds[-1].ts == (0, 1, 2, 3, 4, 5)


def test_more_points_need_not_be_better():
    rounds = list(search_schedule(lambda ts: len(ts) + ideal(ts, (22,)) / 100, read_range("0", "39", 40, 2), 2))
    assert best_schedule(rounds) == ((0, 39), 2.17)
    rounds = list(search_schedule(lambda ts: -len(ts), read_range("0", "39", 40, 2), 2))
    assert best_schedule(rounds)[0] == rounds[-1].ts


def test_beginnings_are_announced_before_they_are_used():
    announced, asked = [], []

    def score(ts):
        asked.append(ts)
        assert any(ts[: len(b)] == b for b in announced[-1])
        return ideal(ts)

    rounds = list(search_schedule(score, read_range("0", "39", 40, 3), 3, announced.append))
    assert announced == [[r.before[:i] for i in range(1, len(r.before))] for r in rounds]


# --- what a naive search takes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 60))
def test_the_count_of_the_naive_search_is_what_it_takes(size):
    for bottom in range(size):
        score = Counting(lambda p, bottom=bottom: abs(p - bottom))
        assert naive_search(score, 0, size - 1) == bottom
        assert len(score.asked) == textbook_scores(size)


@pytest.mark.parametrize("num_ts", [1, 2, 3])
def test_half_of_the_naive_evaluations_at_most(num_ts):
    """Counted as a network would: a stage costs one, unless a schedule with the same shared beginning has paid it."""
    for targets in combinations((1, 5, 13, 22, 38), 3):
        paid, shared, seen = {"evaluations": 0}, set(), {}
        announced = []

        def score(ts, targets=targets, paid=paid, shared=shared, seen=seen, announced=announced):
            if ts not in seen:
                for length in range(1, len(ts)):
                    if ts[:length] not in shared:
                        paid["evaluations"] += 1
                        shared |= {ts[:length]} & set(announced[-1])
                seen[ts] = sum(min((target - p) ** 2 for p in ts) for target in targets)
            return seen[ts]

        space = read_range("0", "39", 40, num_ts)
        rounds = list(search_schedule(score, space, num_ts, announced.append))
        naive = naive_evaluations(space, rounds)
        assert num_ts > 1 or naive == 38
        assert paid["evaluations"] <= naive / 2
