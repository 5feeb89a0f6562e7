"""A greedy search for the noise levels that a multistep consistency sampler should visit, with few scores.

One point at a time is added where it lowers a score most (Song et al. 2023, Consistency Models, arXiv 2303.01469,
section 4.2 and appendix: ternary search, on the assumption that the score has one valley between two points).

A schedule is a tuple of rising indices into a grid of `steps` noise levels, from 0 to steps-1; the last only closes
the list, so a schedule of n indices evaluates the network n-1 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cm.errors import UserError

Schedule = tuple[int, ...]


def ternary_search(score: Callable[[int], float], low: int, high: int) -> int:
    """The index in low..high, both included, with the lowest score; the lower index of equal scores.

    Two probes divide the remaining indices into three parts, and the outer part next to the worse probe is dropped. The
    probes are at Fibonacci numbers rather than at thirds (Kiefer 1953), so that one of them is used again in the next
    round: 38 indices take 8 scores at most. If the score has one valley the answer is its bottom; otherwise it is the
    best index that was scored.

    :param score: called at most once for an index.
    :raises ValueError: if low > high.
    """
    if low > high:
        raise ValueError(f"a search needs at least one index, got {low} to {high}")
    scores: dict[int, float] = {}

    def at(index: int) -> float:
        if index > high:                                            # the interval is extended to a Fibonacci number
            return math.inf
        if index not in scores:
            scores[index] = score(index)
        return scores[index]

    first, a, b = low, 1, 2                                         # b-1 indices remain, starting at `first`
    while first + b - 2 < high:
        a, b = b, a + b
    while b > 2:
        left, right = first + (b - a) - 1, first + a - 1
        if at(left) > at(right):
            first = left + 1
        a, b = b - a, a
    at(first)
    return min(scores, key=lambda index: (scores[index], index))


@dataclass(frozen=True)
class Interval:
    """A gap of a schedule for a new point p: ts[:place] + (p,) + ts[place:], with low <= p <= high."""

    ts: Schedule
    place: int
    low: int
    high: int

    def filled(self, point: int) -> Schedule:
        """The schedule with the point in its place."""
        return (*self.ts[: self.place], point, *self.ts[self.place :])

    @property
    def prefix(self) -> Schedule:
        """The part of the schedule that all candidates share from the start."""
        return self.ts[: self.place]

    @property
    def size(self) -> int:
        """The number of indices that the point may have."""
        return self.high - self.low + 1


@dataclass(frozen=True)
class SearchRange:
    """The schedule to start from, and the lowest and highest index that a new point may have."""

    ts: Schedule
    low: int
    high: int

    def intervals(self, ts: Schedule) -> list[Interval]:
        """The places in `ts` where another point fits."""
        intervals = [
            Interval(ts, place, max(left + 1, self.low), min(right - 1, self.high))
            for place, (left, right) in enumerate(pairwise(ts), start=1)
        ]
        return [interval for interval in intervals if interval.size > 0]


def read_range(begin: str, end: str, steps: int, num_ts: int) -> SearchRange:
    """The search range that --begin and --end describe.

    :param begin: the points before the search, such as 0 or 0,10; they stay in the schedule.
    :param end: the points after it, closed by steps-1, such as 39 or 30,39; or one index below steps-1, the highest
        that a point may have.
    :param num_ts: how many points must fit in between.
    :raises UserError: if that makes no schedule, or fewer points fit.
    """
    before, after = _read_indices("begin", begin), _read_indices("end", end)
    is_limit = after[-1] < steps - 1
    ts = before + ((steps - 1,) if is_limit else after)
    space = SearchRange(ts, before[-1] + 1, after[0] if is_limit else after[0] - 1)
    problem = _problem_of(before, after, steps)
    if not problem:
        fitting = sum(interval.size for interval in space.intervals(ts))
        problem = f"{fitting} more points fit, and --num_ts asks for {num_ts}" if num_ts > fitting else ""
    if problem:
        raise UserError(f"--begin {begin} --end {end} with --steps {steps}: {problem}")
    return space


def _problem_of(before: Schedule, after: Schedule, steps: int) -> str:
    """Why these indices make no schedule; empty if they do."""
    if before[0] != 0:
        return "--begin must start at 0, the noise level that sampling starts from"
    if after[-1] > steps - 1:
        return f"the noise levels are 0 to {steps - 1}"
    if len(after) > 1 and after[-1] != steps - 1:
        return f"a list of later points must be closed by steps-1 = {steps - 1}"
    if any(b <= a for a, b in pairwise(before + after)):
        return "the indices must rise, and --begin must end below where --end begins"
    return ""


def as_text(ts: Sequence[int]) -> str:
    """(0, 22, 39) -> '0,22,39', as --ts takes it."""
    return ",".join(map(str, ts))


def _read_indices(flag: str, text: str) -> tuple[int, ...]:
    """The inverse of `as_text`, for indices of at least 0."""
    try:
        indices = tuple(int(part) for part in text.split(","))
    except ValueError:
        indices = ()
    if not indices or min(indices) < 0:
        raise UserError(f"--{flag} {text!r} is not a list of indices such as 0 or 0,22")
    return indices


@dataclass(frozen=True)
class Round:
    """One point added to a schedule."""

    before: Schedule
    before_score: float
    ts: Schedule
    score: float
    tried: dict[int, float] = field(default_factory=dict)           # index of the new point -> score, rising

    @property
    def point(self) -> int:
        """The index that was added."""
        return next(index for index in self.ts if index not in self.before)


def search_schedule(
    score: Callable[[Schedule], float],
    space: SearchRange,
    num_ts: int,
    share: Callable[[list[Schedule]], None] = lambda prefixes: None,
) -> Iterator[Round]:
    """Add `num_ts` points, each where the score is lowest among all intervals, and yield each round when it is done.

    :param score: lower is better; called again for the last round's schedule, so it should store its results.
    :param share: called before each round with the prefixes that its schedules share.
    """
    ts = space.ts
    for _ in range(num_ts):
        intervals = space.intervals(ts)
        share([interval.prefix for interval in intervals])
        before_score = score(ts)
        tried = {point: value for each in intervals for point, value in _search_interval(score, each).items()}
        point = min(tried, key=lambda index: (tried[index], index))
        found = tuple(sorted((*ts, point)))
        yield Round(ts, before_score, found, tried[point], dict(sorted(tried.items())))
        ts = found


def _search_interval(score: Callable[[Schedule], float], interval: Interval) -> dict[int, float]:
    """The scores of the points that the search tried in one interval, its best among them."""
    tried = {}

    def at(point: int) -> float:
        tried[point] = score(interval.filled(point))
        return tried[point]

    ternary_search(at, interval.low, interval.high)
    return tried


def best_schedule(rounds: Iterable[Round]) -> tuple[Schedule, float]:
    """The schedule with the lowest score of all rounds, the shorter of equal ones: more points need not help."""
    scored = [each for r in rounds for each in ((r.before, r.before_score), (r.ts, r.score))]
    return min(scored, key=lambda each: (each[1], len(each[0])))


def naive_evaluations(space: SearchRange, rounds: Iterable[Round]) -> int:
    """Network evaluations per image of the same search with probes at thirds, each sampled from the start."""
    return sum(textbook_scores(each.size) * len(r.before) for r in rounds for each in space.intervals(r.before))


def textbook_scores(size: int) -> int:
    """How often a ternary search that stores no score computes one, among `size` indices.

    It scores at both thirds until at most three indices remain, and then each of those.
    """
    width, scores = size - 1, 0
    while width >= 3:
        scores, width = scores + 2, width - width // 3
    return scores + width + 1
