"""Numbers made by the original float32 implementation (tests/data/golden_small.npz), and how far to trust them.

The small network behind them is 32x32, 32 channels, multipliers 1,2, one residual block per level, attention at 16
pixels, 16 channels per head, residual up and down blocks, scale-shift norm, 1000 classes; all parameters are random.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch as th

from cm.networks.unet import UNet, UNetConfig, attention_factors

DATA = Path(__file__).resolve().parents[1] / "data"


@cache
def _archive() -> np.lib.npyio.NpzFile:
    return np.load(DATA / "golden_small.npz", allow_pickle=False)      # reads an array only when it is asked for


@cache
def _spreads() -> dict[str, dict[str, float]]:
    return json.loads((DATA / "golden_small_tolerance.json").read_text())["arrays"]


def names(prefix: str = "") -> list[str]:
    """The names of all stored arrays that begin with `prefix`."""
    return [name for name in _archive().files if name.startswith(prefix)]


def numpy(name: str) -> np.ndarray:
    """One array, as numpy, a fresh copy at each call."""
    return _archive()[name]


def tensor(name: str) -> th.Tensor:
    """One array, as a tensor of the stored dtype (float32, float64, int64 or uint8); a fresh copy at each call."""
    return th.from_numpy(numpy(name))


def from_json(name: str) -> dict:
    """A stored JSON text, such as "config_json" or "sample/cases_json"."""
    return json.loads(str(numpy(name)))


def tolerance(name: str) -> float:
    """Largest difference to accept: 10 times what float32 rounding did to the original, plus 1e-6 of the magnitude."""
    spread = _spreads()[name]
    return 10 * spread["max_abs_diff_float32_vs_float64"] + 1e-6 * spread["max_abs"]


def assert_close(actual: th.Tensor, name: str, scale: float = 1.0) -> None:
    """Compare with the array `name`, within `scale` times its tolerance."""
    expected = tensor(name)
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.detach().double() - expected.double()).abs().max().item()
    allowed = scale * tolerance(name)
    assert difference <= allowed, f"{name}: off by {difference:.2e}, allowed {allowed:.2e}"


def state(which: str = "model") -> dict[str, th.Tensor]:
    """The state dict of the golden "model", "teacher", or "target" (3/4 model + 1/4 teacher, in float32)."""
    if which == "target":
        model, teacher = state("model"), state("teacher")
        return {key: 0.75 * model[key] + 0.25 * teacher[key] for key in model}
    prefix = f"state/{which}/"
    return {name.removeprefix(prefix): tensor(name) for name in names(prefix)}


def config() -> dict:
    """The options of the golden network."""
    return from_json("config_json")


def build(which: str | None = "model", **changes) -> UNet:
    """The golden network in evaluation mode, with the weights `which` (None: fresh) and constructor `changes`."""
    c = config()
    options = dict(
        image_size=c["image_size"],
        in_channels=3,
        model_channels=c["num_channels"],
        out_channels=3,
        num_res_blocks=c["num_res_blocks"],
        attention_resolutions=attention_factors(c["image_size"], map(int, c["attention_resolutions"].split(","))),
        dropout=c["dropout"],
        channel_mult=[float(m) for m in c["channel_mult"].split(",")],
        num_classes=c["num_classes"],
        num_heads=c["num_heads"],
        num_head_channels=c["num_head_channels"],
        use_scale_shift_norm=c["use_scale_shift_norm"],
        resblock_updown=c["resblock_updown"],
    )
    model = UNet(UNetConfig(**{**options, **changes})).eval()
    if which is not None:
        model.load_state_dict(state(which))
    return model
