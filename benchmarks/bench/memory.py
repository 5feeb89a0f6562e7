"""Peak memory of a training step, each way in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch as th

from bench.lines import Line
from bench.network import SPECS
from bench.train import PASSES, plain_job, toolkit_job

STEPS = 2


def memory_suite(device: th.device) -> list[Line]:
    """A line for each mode and way."""
    lines = []
    for mode in PASSES:
        plain = peak_in_child(device.type, mode, "plain", "fp32")
        for way, precision in (("plain", "fp32"), ("toolkit", "fp32"), ("toolkit", "bf16")):
            peak = plain if way == "plain" else peak_in_child(device.type, mode, way, precision)
            note = f"{peak / plain:.2f} of plain"
            lines.append(Line("memory", f"{mode}, {way} {precision}", 0.0, peak_mib=peak, note=note))
    return lines


def peak_in_child(device: str, mode: str, way: str, precision: str) -> float:
    """MiB that the job needs above what the process held before it was built."""
    code = f"from bench.memory import peak; print(peak({device!r}, {mode!r}, {way!r}, {precision!r}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], check=True, capture_output=True, text=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


def peak(device_type: str, mode: str, way: str, precision: str) -> float:
    device, spec = th.device(device_type), SPECS[device_type]
    th.mm(th.ones(64, 64, device=device), th.ones(64, 64, device=device))       # what the libraries take once
    before = held(device)
    images = spec.images(device)
    if way == "plain":
        job = plain_job(mode, spec, device, images)
    else:
        job = toolkit_job(mode, spec, device, images, precision)
    for _ in range(STEPS):
        job()
    return held(device) - before


def held(device: th.device) -> float:
    """The most MiB held so far."""
    if device.type == "cuda":
        return th.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
