"""How fast images reach training; `benchmarks/data.py` is the same on images of one's own."""

from __future__ import annotations

from data import measure_noise

from bench.lines import Line

COUNT, ROUNDS, BATCH = 2048, 8, 128


def data_suite(side: int, count: int = COUNT, rounds: int = ROUNDS, batch: int = BATCH) -> list[Line]:
    """A line for each kind of work and store, for noise of side x side pixels."""
    return [
        Line("data", f"{title}, {store}", numbers["microseconds"] / 1e6, 1e6 / numbers["microseconds"],
             note=f"{numbers['ratio']:.2f} of the folder's time")
        for title, stores in measure_noise(count, side, rounds, batch).items() for store, numbers in stores.items()
    ]
