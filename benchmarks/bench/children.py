"""Peak memory, measured in a process of its own, where nothing has been held before."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch as th

from bench import process_memory
from cm.distributed import setup as dist

STEPS = 2
BENCHMARKS = Path(__file__).resolve().parent.parent           # where a child finds `bench`


def peak_in_child(module: str, function: str, *args: object, device: th.device, plain: bool = False) -> float:
    """MiB that a job needs above what the process held before it was built.

    :param module, function: what makes the job, of the device and `args`, which JSON can carry.
    :param plain: whether the process is left as Python starts it, without the toolkit's settings.
    """
    order = json.dumps([module, function, args, device.type, plain])
    code = f"from bench.children import print_peak; print_peak({order!r})"
    out = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True, capture_output=True, text=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


def print_peak(order: str) -> None:
    module, function, args, device_type, plain = json.loads(order)
    if not plain:
        dist.setup_dist(device=device_type)
    make, device = getattr(importlib.import_module(module), function), th.device(device_type)
    th.mm(th.ones(64, 64, device=device), th.ones(64, 64, device=device))       # what the libraries take once
    process_memory.forget_peak()
    before = th.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else process_memory.resident_mib()
    job = make(device, *args)
    for _ in range(STEPS):
        job()
    peak = th.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else process_memory.peak_mib()
    print(peak - before)
