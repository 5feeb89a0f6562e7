"""Results: one line each, printed as a table, written as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

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
    time_over_baseline: float | None = None                 # median of the ratios of neighbouring runs
    peak_mib: float | None = None                           # above what the process holds before
    note: str = ""


def speed_line(
    suite: str, name: str, times: Times, images: int, flops: float, ceiling: Ceiling, dtype: str,
    baseline: Times | None = None, peak_mib: float | None = None, note: str = "",
) -> Line:
    """A line of a job that makes or trains on `images` images with `flops` operations in all."""
    speed = flops / times.median
    return Line(
        suite, name, times.median, images / times.median, speed / 1e9, speed / ceiling.gemm[dtype],
        speed / ceiling.conv[dtype], None if baseline is None else times.ratio(baseline), peak_mib, note,
    )


COLUMNS: Mapping[str, tuple[str, str]] = {
    "name": ("", "{}"),
    "seconds": ("s (median)", "{:.3g}"),
    "images_per_second": ("images/s", "{:.1f}"),
    "achieved_gflops": ("GFLOP/s", "{:.0f}"),
    "share_of_gemm": ("of GEMM", "{:.0%}"),
    "share_of_conv": ("of 3x3 conv", "{:.0%}"),
    "time_over_baseline": ("time / plain", "{:.2f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "note": ("", "{}"),
}


def table(lines: Sequence[Line]) -> str:
    """A Markdown table, without the columns that are empty."""
    rows = [asdict(line) for line in lines]
    shown = [key for key in COLUMNS if any(row[key] not in (None, "") for row in rows)]
    cells = [[COLUMNS[key][0] for key in shown], ["---"] * len(shown)]
    cells += [["" if row[key] is None else COLUMNS[key][1].format(row[key]) for key in shown] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def machine(device: th.device) -> dict[str, Any]:
    """What the numbers were measured with."""
    facts = {
        "python": platform.python_version(), "torch": th.__version__, "numpy": np.__version__,
        "threads": th.get_num_threads(), "cores": os.cpu_count(), "system": platform.system(),
        "cpu": cpu_name(), "load": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        facts |= {"gpu": th.cuda.get_device_name(device), "cuda": th.version.cuda}
    return facts


def cpu_name() -> str:
    try:
        for row in Path("/proc/cpuinfo").read_text().splitlines():
            if row.startswith("model name"):
                return row.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def write_results(
    folder: Path, device: th.device, ceiling: Ceiling, suites: Mapping[str, Sequence[Line]]
) -> None:
    """results_<device>.json and RESULTS_<device>.md in `folder`."""
    facts = machine(device)
    content = {
        "command": command(), "machine": facts, "ceiling": asdict(ceiling),
        "lines": [asdict(line) for lines in suites.values() for line in lines],
    }
    (folder / f"results_{device.type}.json").write_text(json.dumps(content, indent=2) + "\n")
    parts = [f"# Measured on {facts.get('gpu', facts['cpu'])}", f"`{command()}`",
             ", ".join(f"{key} {value}" for key, value in facts.items()), ceiling_text(ceiling)]
    for suite, lines in suites.items():
        parts += [f"## {suite}", table(lines)]
    (folder / f"RESULTS_{device.type}.md").write_text("\n\n".join(parts) + "\n")


def ceiling_text(ceiling: Ceiling) -> str:
    rows = [f"{name}: GEMM {ceiling.gemm[name] / 1e9:.0f}, 3x3 convolution {ceiling.conv[name] / 1e9:.0f}"
            for name in ceiling.gemm]
    return f"Ceiling of this machine in GFLOP/s, measured in the same run. {'; '.join(rows)}."


def command() -> str:
    return " ".join(["python benchmarks/run.py", *sys.argv[1:]])
