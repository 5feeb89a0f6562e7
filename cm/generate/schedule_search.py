"""Which noise levels a multistep consistency sampler should visit: a greedy search with few scores.

One point at a time is added where it lowers a score most (Song et al. 2023, Consistency Models, arXiv 2303.01469,
section 4.2 and appendix: ternary search, on the assumption that the score has one valley between two points).

A schedule is a tuple of rising indices into a grid of `steps` noise levels, from 0 to steps-1; the last only closes
the list, so a schedule of n indices evaluates the network n-1 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from cm.errors import UserError

Schedule = tuple[int, ...]


def ternary_search(score: Callable[[int], float], low: int, high: int) -> int:
    """The index in low..high, both included, with the lowest score; the lower of equals.

    Two probes cut what is left in three, and the worse side goes. They stand at Fibonacci numbers rather than at thirds
    (Kiefer 1953), so that one of them serves in the next round again: 38 indices take 8 scores at most. Where
    the score has one valley the answer is its bottom; otherwise it is the best index that was scored.

    :param score: called once for an index at most.
    :raises ValueError: if low > high.
    """
    if low > high:
        raise ValueError(f"a search needs at least one index, got {low} to {high}")
    scores: dict[int, float] = {}

    def at(index: int) -> float:
        if index > high:                                            # the interval is filled up to a Fibonacci number
            return math.inf
        if index not in scores:
            scores[index] = score(index)
        return scores[index]

    first, a, b = low, 1, 2                                         # b-1 indices are left, from `first` on
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
    """Where a point may go: into ts[:place] + (p,) + ts[place:], with low <= p <= high."""

    ts: Schedule
    place: int
    low: int
    high: int

    def filled(self, point: int) -> Schedule:
        return (*self.ts[: self.place], point, *self.ts[self.place :])

    @property
    def beginning(self) -> Schedule:
        """The part of the schedule that all candidates share from the start."""
        return self.ts[: self.place]

    @property
    def size(self) -> int:
        return self.high - self.low + 1


@dataclass(frozen=True)
class SearchRange:
    """The schedule to start from, and the lowest and highest index that a new point may have."""

    ts: Schedule
    low: int
    high: int

    def gaps(self, ts: Schedule) -> list[Interval]:
        """The places of `ts` with room for a point."""
        gaps = [
            Interval(ts, place, max(left + 1, self.low), min(right - 1, self.high))
            for place, (left, right) in enumerate(pairwise(ts), start=1)
        ]
        return [gap for gap in gaps if gap.size > 0]


def read_range(begin: str, end: str, steps: int, num_ts: int) -> SearchRange:
    """What --begin and --end mean.

    :param begin: the points before the search, such as 0 or 0,10; they stay in the schedule.
    :param end: the points after it, closed by steps-1, such as 39 or 30,39; or one index below steps-1, the highest
        that a point may have.
    :param num_ts: how many points there must be room for.
    :raises UserError: if that makes no schedule, or has too little room.
    """
    before, after = read_indices("begin", begin), read_indices("end", end)
    asked = f"--begin {begin} --end {end} with --steps {steps}"
    if before[0] != 0:
        raise UserError(f"{asked}: --begin must start at 0, the noise level that sampling starts from")
    if after[-1] > steps - 1:
        raise UserError(f"{asked}: the noise levels are 0 to {steps - 1}")
    if len(after) > 1 and after[-1] != steps - 1:
        raise UserError(f"{asked}: a list of later points must be closed by steps-1 = {steps - 1}")
    if any(b <= a for a, b in pairwise(before + after)):
        raise UserError(f"{asked}: the indices must rise, and --begin must end below where --end begins")
    is_limit = after[-1] < steps - 1
    ts = before + ((steps - 1,) if is_limit else after)
    space = SearchRange(ts, before[-1] + 1, after[0] if is_limit else after[0] - 1)
    room = sum(gap.size for gap in space.gaps(ts))
    if num_ts > room:
        raise UserError(f"{asked}: there is room for {room} more points, and --num_ts asks for {num_ts}")
    return space


def read_indices(flag: str, text: str) -> Schedule:
    try:
        indices = tuple(int(word) for word in text.split(","))
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
        return next(index for index in self.ts if index not in self.before)


def search_schedule(
    score: Callable[[Schedule], float],
    space: SearchRange,
    num_ts: int,
    share: Callable[[list[Schedule]], None] = lambda beginnings: None,
) -> Iterator[Round]:
    """Add `num_ts` points, each where the score is lowest among all gaps, and yield each round when it is done.

    :param score: lower is better; asked again for a schedule it has seen where rounds meet, so it should remember.
    :param share: told before each round with which beginnings its schedules start.
    """
    ts = space.ts
    for _ in range(num_ts):
        gaps = space.gaps(ts)
        share([gap.beginning for gap in gaps])
        before_score = score(ts)
        tried = {point: value for gap in gaps for point, value in search_gap(score, gap).items()}
        point = min(tried, key=lambda index: (tried[index], index))
        found = tuple(sorted((*ts, point)))
        yield Round(ts, before_score, found, tried[point], dict(sorted(tried.items())))
        ts = found


def search_gap(score: Callable[[Schedule], float], gap: Interval) -> dict[int, float]:
    """The scores of the points that the search tried in one gap, its best among them."""
    tried = {}

    def at(point: int) -> float:
        tried[point] = score(gap.filled(point))
        return tried[point]

    ternary_search(at, gap.low, gap.high)
    return tried


def best_schedule(rounds: Iterable[Round]) -> tuple[Schedule, float]:
    """The schedule with the lowest score on the way, the shorter of equals: more points need not help."""
    stations = [station for r in rounds for station in ((r.before, r.before_score), (r.ts, r.score))]
    return min(stations, key=lambda station: (station[1], len(station[0])))


def naive_evaluations(space: SearchRange, rounds: Iterable[Round]) -> int:
    """Network evaluations per image of the same search with probes at thirds, each sampled from the start."""
    return sum(textbook_scores(gap.size) * len(r.before) for r in rounds for gap in space.gaps(r.before))


def textbook_scores(size: int) -> int:
    """How often a ternary search that remembers nothing scores, among `size` indices.

    It scores at both thirds until at most three indices are left, and then each of those.
    """
    width, scores = size - 1, 0
    while width >= 3:
        scores, width = scores + 2, width - width // 3
    return scores + width + 1
