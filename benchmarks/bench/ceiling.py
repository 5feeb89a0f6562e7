"""What the machine itself can do, measured in the run whose lines are held against it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch as th
import torch.nn.functional as F

from bench.timing import take_turns

SIDE = {"cpu": 2048, "cuda": 8192}                          # of the square matrices: large enough to be compute-bound
DTYPES = {"fp32": th.float32, "bf16": th.bfloat16}
PUBLISHED_BF16 = {                                          # without sparsity; the first that fits counts
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "RTX 4090": 165e12,
}
"""A part of a GPU's name -> FLOP/s that its maker states."""


@dataclass(frozen=True)
class Ceiling:
    """FLOP/s of this machine by dtype."""

    gemm: dict[str, float]
    conv: dict[str, float]                                  # a 3x3 convolution at the network's widest shape
    published: dict[str, float] = field(default_factory=dict)       # stated by the maker, where it is known

    def best(self, dtype: str) -> float:
        """The higher of the two: on some CPUs torch's convolutions use wider instructions than its products."""
        return max(self.gemm[dtype], self.conv[dtype])


def measure_ceiling(
    device: th.device, batch: int, channels: int, side: int, repeats: int = 5
) -> Ceiling:
    """Time large matrix products and convolutions of [batch,channels,side,side], forward only, channels last."""
    n = SIDE[device.type]
    jobs, flops = {}, {}
    for name, dtype in DTYPES.items():
        a, b = (th.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        x = th.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=th.channels_last)
        w = th.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=th.channels_last)
        jobs[f"gemm {name}"] = lambda a=a, b=b: th.mm(a, b)
        jobs[f"conv {name}"] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
        flops[f"gemm {name}"] = 2 * n**3
        flops[f"conv {name}"] = 2 * 9 * channels**2 * batch * side**2
    with th.inference_mode():
        times = take_turns(jobs, device, repeats)
    speed = {name: flops[name] / min(times[name].rounds) for name in jobs}      # a ceiling is the best, not the median
    name = th.cuda.get_device_name(device) if device.type == "cuda" else ""
    return Ceiling(
        {name: speed[f"gemm {name}"] for name in DTYPES}, {name: speed[f"conv {name}"] for name in DTYPES},
        published_speed(name),
    )


def published_speed(gpu: str) -> dict[str, float]:
    """FLOP/s in bf16 that the maker of a GPU states; empty for one that is not in `PUBLISHED_BF16`."""
    found = next((speed for part, speed in PUBLISHED_BF16.items() if part in gpu), None)
    return {} if found is None else {"bf16": found}
