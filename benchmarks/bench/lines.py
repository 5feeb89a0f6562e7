"""What was measured: a line for each thing, and a table of lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from bench.ceiling import Ceiling
from bench.timing import Times


@dataclass(frozen=True)
class Line:
    """One measured thing; what does not apply is None."""

    suite: str
    name: str
    seconds: float | None                                   # median
    images_per_second: float | None = None
    achieved_gflops: float | None = None                    # GFLOP/s of the network's matrix work
    share_of_gemm: float | None = None                      # of the measured ceiling of the same dtype
    share_of_conv: float | None = None
    mfu: float | None = None                                # share of the speed that the GPU's maker states
    time_over_baseline: float | None = None                 # median of the ratios of neighbouring runs
    peak_mib: float | None = None                           # above what the process holds before
    launches: int | None = None                             # operations that the device is given
    launches_over_plain: float | None = None
    note: str = ""


def speed_line(
    suite: str, name: str, times: Times, images: int, flops: float, ceiling: Ceiling, dtype: str,
    baseline: Times | None = None, peak_mib: float | None = None, note: str = "",
) -> Line:
    """A line of a job that makes or trains on `images` images with `flops` operations in all."""
    speed = flops / times.median
    mfu = speed / ceiling.published[dtype] if dtype in ceiling.published else None
    return Line(
        suite, name, times.median, images / times.median, speed / 1e9, speed / ceiling.gemm[dtype],
        speed / ceiling.conv[dtype], mfu, None if baseline is None else times.ratio(baseline), peak_mib, note=note,
    )


COLUMNS: Mapping[str, tuple[str, str]] = {
    "name": ("", "{}"),
    "seconds": ("s (median)", "{:.3g}"),
    "images_per_second": ("images/s", "{:.1f}"),
    "achieved_gflops": ("GFLOP/s", "{:.0f}"),
    "share_of_gemm": ("of GEMM", "{:.0%}"),
    "share_of_conv": ("of 3x3 conv", "{:.0%}"),
    "mfu": ("MFU", "{:.0%}"),
    "time_over_baseline": ("time / plain", "{:.2f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "launches": ("operations", "{:,}"),
    "launches_over_plain": ("operations / plain", "{:.2f}"),
    "note": ("", "{}"),
}


def table(lines: Sequence[Line]) -> str:
    """A Markdown table, without the columns that are empty."""
    rows = [asdict(line) for line in lines]
    shown = [key for key in COLUMNS if any(row[key] not in (None, "") for row in rows)]
    cells = [[COLUMNS[key][0] for key in shown], ["---"] * len(shown)]
    cells += [["" if row[key] is None else COLUMNS[key][1].format(row[key]) for key in shown] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
