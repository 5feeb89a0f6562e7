"""Time several ways of doing one thing so that the ratios hold on a machine whose speed drifts."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch as th

WARM_UP = 2                                                 # rounds that do not count


@dataclass(frozen=True)
class Times:
    """Seconds of each round of one contestant."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: Times) -> float:
        """Median over the rounds of own time by the other's, each pair measured within moments of each other."""
        return statistics.median(own / its for own, its in zip(self.rounds, other.rounds, strict=True))


def take_turns(
    contestants: Mapping[str, Callable[[], object]], device: th.device, repeats: int = 5, warm_up: int = WARM_UP
) -> dict[str, Times]:
    """Run all contestants in turn, A B C A B C ..., and time each run after `warm_up` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warm_up + repeats):
        for name, run in contestants.items():
            wait_for(device)
            begun = time.perf_counter()
            run()
            wait_for(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - begun)
    return {name: Times(tuple(each)) for name, each in seconds.items()}


def make_and_take_turns(
    makers: Mapping[str, Callable[[], Callable[[], object]]], device: th.device, repeats: int = 5
) -> dict[str, Times]:
    """`take_turns` of contestants that hold networks and optimizers, each made by a function.

    On a GPU one after the other: together they would not fit its memory, and its speed drifts less than a CPU's.
    """
    if device.type == "cpu":
        return take_turns({name: make() for name, make in makers.items()}, device, repeats)
    times = {}
    for name, make in makers.items():
        times |= take_turns({name: make()}, device, repeats)
        gc.collect()
        th.cuda.empty_cache()
    return times


def wait_for(device: th.device) -> None:
    if device.type == "cuda":
        th.cuda.synchronize(device)
