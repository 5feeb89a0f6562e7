"""Resident memory of this process, as Linux counts it. What getrusage calls the peak is inherited from the parent."""

from __future__ import annotations

from pathlib import Path


def resident_mib() -> float:
    return status("VmRSS")


def peak_mib() -> float:
    """Since `forget_peak`, or since the start."""
    return status("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**10
