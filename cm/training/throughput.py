"""The status line of NVlabs/edm and StyleGAN, once per tick: progress, speed, memory."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch as th

GIB = 2**30
LINE = (
    ("tick", "{:<5.0f}"), ("kimg", "{:<9.1f}"), ("time", "{:<12}"), ("sec_per_tick", "{:<7.1f}"),
    ("sec_per_kimg", "{:<7.2f}"), ("maintenance_sec", "{:<6.1f}"), ("cpumem_gib", "{:<6.2f}"),
    ("gpumem_gib", "{:<6.2f}"), ("reserved_gib", "{:<6.2f}"),
)
TITLES = {"sec_per_tick": "sec/tick", "sec_per_kimg": "sec/kimg", "maintenance_sec": "maintenance",
          "cpumem_gib": "cpumem", "gpumem_gib": "gpumem", "reserved_gib": "reserved"}


class Ticks:
    """Measures the ticks of a run. A tick ends when its row is written; the time between two ticks is maintenance.

    :param step: first step of this start of the run.
    :param tick_steps: number of steps of a tick.
    :param seconds_before: seconds of training in earlier starts.
    """

    def __init__(self, step: int, tick_steps: int, device: th.device, seconds_before: float = 0.0):
        self.tick_steps, self.device = tick_steps, device
        self.tick_start = time.monotonic()
        self.start_time = self.tick_start - seconds_before
        self.last_step, self.idle = step, 0.0

    @contextlib.contextmanager
    def maintenance(self) -> Iterator[None]:
        """A context: its time does not count for the tick, and is reported as maintenance in the next row."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.idle, self.tick_start = self.idle + seconds, self.tick_start + seconds

    def end(self, step: int, batch: int) -> dict[str, float]:
        """The tick that ends with this step, as columns of the log's row.

        :param batch: images per step over all ranks.
        """
        now = time.monotonic()
        seconds, kimg_of_tick = now - self.tick_start, (step - self.last_step) * batch / 1000
        gpu = th.cuda.is_available() and self.device.type == "cuda"
        row = {
            "tick": -(-step // self.tick_steps),
            "kimg": step * batch / 1000,
            "time_sec": now - self.start_time,
            "sec_per_tick": seconds,
            "sec_per_kimg": seconds / max(kimg_of_tick, 1e-9),
            "maintenance_sec": self.idle,
            "cpumem_gib": resident_bytes() / GIB,
            "gpumem_gib": th.cuda.max_memory_allocated(self.device) / GIB if gpu else 0.0,
            "reserved_gib": th.cuda.max_memory_reserved(self.device) / GIB if gpu else 0.0,
        }
        if gpu:
            th.cuda.reset_peak_memory_stats(self.device)
        self.last_step, self.tick_start, self.idle = step, now, 0.0
        return row


def status_line(row: dict[str, float]) -> str:
    """The row of a tick as one line of text."""
    shown = row | {"time": spell_time(row["time_sec"])}
    return " ".join(f"{TITLES.get(name, name)} {form.format(shown[name])}" for name, form in LINE).rstrip()


def spell_time(seconds: float) -> str:
    """3725 -> '1h 02m 05s'."""
    whole = round(seconds)
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}d {hours:02d}h {minutes:02d}m"
    if hours:
        return f"{hours}h {minutes:02d}m {rest:02d}s"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def resident_bytes() -> int:
    """Resident memory of this process in bytes; its maximum so far on systems without /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
