"""Results on disk: JSON of each kind of device, and one page of tables for people.

A suite that was measured takes the place of its older lines; the others stay, each with the machine and the command
that they come from.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from bench.ceiling import Ceiling
from bench.lines import Line, table
from cm.io.storage import write_bytes

PAGE = "RESULTS.md"


def keep(folder: Path, suite: str, lines: Sequence[Line], device: th.device, ceiling: Ceiling) -> None:
    """Put a suite into results_<device>.json of `folder`, and write the page anew."""
    path = folder / f"results_{device.type}.json"
    suites = json.loads(path.read_text()) if path.exists() else {}
    suites[suite] = {
        "command": command(), "machine": machine(device), "ceiling": asdict(ceiling),
        "lines": [asdict(line) for line in lines],
    }
    write_bytes(path, (json.dumps(suites, indent=1) + "\n").encode())
    write_bytes(folder / PAGE, page(folder).encode())


def page(folder: Path) -> str:
    """The tables of all devices' results in `folder`, in Markdown."""
    parts = ["# Measured"]
    for path in sorted(folder.glob("results_*.json")):
        before = None
        for suite, kept in json.loads(path.read_text()).items():
            facts = dict(kept["machine"])
            name, load = facts.pop("gpu", facts["cpu"]), facts.pop("load")
            if facts != before:
                before = facts
                parts += [f"## On {name}", ", ".join(f"{key} {value}" for key, value in facts.items())]
            parts += [f"### {suite}", f"`{kept['command']}`, load {load} at the end. {ceiling_text(kept['ceiling'])}",
                      table([Line(**line) for line in kept["lines"]])]
    return "\n\n".join(parts) + "\n"


def ceiling_text(ceiling: dict[str, dict[str, float]]) -> str:
    rows = [f"{name}: GEMM {ceiling['gemm'][name] / 1e9:.0f}, 3x3 convolution {ceiling['conv'][name] / 1e9:.0f}"
            for name in ceiling["gemm"]]
    return f"Ceiling in GFLOP/s, measured in the same run: {'; '.join(rows)}."


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


def command() -> str:
    return " ".join(["python benchmarks/run.py", *sys.argv[1:]])
