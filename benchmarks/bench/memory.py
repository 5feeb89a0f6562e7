"""Peak memory of a training step, each way in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch as th

from bench.children import peak_in_child
from bench.lines import Line
from bench.network import SPECS
from bench.train import PASSES, plain_job, toolkit_job


def memory_suite(device: th.device) -> list[Line]:
    """A line for each mode and way."""
    lines = []
    for mode in PASSES:
        plain = 0.0
        for way, precision in (("plain", "fp32"), ("toolkit", "fp32"), ("toolkit", "bf16")):
            peak = peak_in_child("bench.memory", "step", mode, way, precision, device=device, plain=way == "plain")
            plain = plain or peak
            note = f"{peak / plain:.2f} of plain"
            lines.append(Line("memory", f"{mode}, {way} {precision}", None, peak_mib=peak, note=note))
    return lines


def step(device: th.device, mode: str, way: str, precision: str) -> Callable[[], None]:
    """What is measured: a training step."""
    spec = SPECS[device.type]
    images = spec.images(device)
    if way == "plain":
        return plain_job(mode, spec, device, images)
    return toolkit_job(mode, spec, device, images, precision)
