"""Where the time of a step goes: a trace of a few steps, and a table of the slowest operations.

Only rank 0 is traced: the ranks do the same work, and its waiting for the others appears in the collectives.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage] (documented, not in __all__)
from torch.profiler import ProfilerActivity, profile

from cm.distributed import setup as dist
from cm.io import storage
from cm.logging import logger

WARM_UP = 3                                                 # steps that allocate, choose kernels or compile
TRACE, TABLE = "profile_trace.json.gz", "profile.txt"
TOP = 10
REST = "(launched outside of operations)"


class Cost(NamedTuple):
    """One kind of operation, without those that it calls."""

    name: str
    seconds: float                                          # in all
    calls: int


@dataclass
class Profile:
    """Traces `steps` training steps after a short warm-up, once per start of a run, and leaves two files of them.

    A run that ends sooner is traced as far as it goes. What callbacks and checkpoints do meanwhile is in the trace.

    :param steps: at least 1.
    """

    steps: int
    seen: int = 0
    profiler: profile | None = field(default=None, repr=False)
    name = "profile"

    def after_step(self, loop: Any) -> dict[str, float]:
        self.seen += 1
        ends = loop.step == loop.total_training_steps or bool(loop.stop_signal)
        traced = self.seen - WARM_UP
        if traced == self.steps or ends and 0 < traced < self.steps:
            dist.on_main(self.write, traced, loop.device)
        elif ends and traced <= 0:
            logger.warn(f"--profile {self.steps}: nothing to trace, the run ends within the {WARM_UP} steps of warm-up")
        elif traced == 0 and dist.is_main():
            self.profiler = start(loop.device)
        return {}

    def write(self, steps: int, device: th.device) -> None:
        """The two files; on rank 0."""
        if device.type == "cuda":
            th.cuda.synchronize(device)
        profiler = self.profiler
        assert profiler is not None, "started before the first step that is traced"
        profiler.stop()
        on_device = device.type == "cuda"
        text = table(costs_of(profiler.key_averages(), on_device), steps)
        trace, listing = (os.path.join(logger.get_dir(), name) for name in (TRACE, TABLE))
        with tempfile.TemporaryDirectory() as folder:       # the exporter would follow a link of the trace's name
            profiler.export_chrome_trace(os.path.join(folder, TRACE))
            content = Path(folder, TRACE).read_bytes()
        storage.write_bytes(trace, content)
        storage.write_atomically(listing, lambda file: file.write(text.encode()))
        self.profiler = None
        logger.log(f"where the time of {steps} steps went, on the {'GPU' if on_device else 'CPU'}:\n{text}"
                   f"trace: {trace} (for chrome://tracing or ui.perfetto.dev)")

    def state_dict(self) -> dict[str, Any]:
        """There is no state: a run that is started again is traced again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state."""


def start(device: th.device) -> profile:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    profiler = profile(activities=activities, acc_events=True)
    profiler.start()
    return profiler


def costs_of(events: Iterable[Any], on_device: bool) -> list[Cost]:
    """What operations took on the device, or on the CPU.

    :param events: what torch's profiler has counted. Of a GPU it lists each kernel twice: with the operation on the CPU
        that launched it, and by itself, also if no operation did. An annotation is listed there as the kernels in it.
    """
    if not on_device:
        return [Cost(event.key, event.self_cpu_time_total / 1e6, event.count) for event in events]
    kernels, costs = 0.0, []
    for event in events:
        seconds = event.self_device_time_total / 1e6
        if event.device_type == DeviceType.CPU:
            costs.append(Cost(event.key, seconds, event.count))
        elif not event.is_user_annotation:
            kernels += seconds
    rest = kernels - sum(cost.seconds for cost in costs)
    return [*costs, Cost(REST, rest, 0)] if rest > 1e-6 else costs       # what rounding leaves is none


def table(costs: Sequence[Cost], steps: int) -> str:
    """The operations that took longest, for people: milliseconds and calls of one step."""
    total = sum(cost.seconds for cost in costs) or 1.0
    top = sorted(costs, key=lambda cost: -cost.seconds)[:TOP]
    width = max((len(cost.name[:60]) for cost in top), default=0)
    lines = [f"{'operation':<{width}}  ms/step   share  calls/step"]
    lines += [
        f"{cost.name[:60]:<{width}}  {cost.seconds / steps * 1e3:>7.2f}  {cost.seconds / total:>6.1%}  "
        f"{cost.calls / steps:>10.1f}"
        for cost in top
    ]
    return "\n".join(lines) + "\n"
