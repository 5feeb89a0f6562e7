"""Who is warned that bf16 does not resolve what an objective compares, and that it does not."""

import pytest
import torch as th

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.diffusion.denoiser import Diffusion
from cm.logging import logger
from cm.networks.build import NetworkConfig, build_network
from cm.objectives import OBJECTIVES
from cm.quickstart.plan import METHODS
from cm.setup.model import diffusion_from
from cm.setup.objective import apply_objective_defaults
from cm.setup.rounding import CLOSEST, warn_of_rounding
from cm.tensors import append_dims

BF16, CT = ("--precision", "bf16"), ("--loss_norm", "l2", "--scale_mode", "progressive", "--start_scales", "2")


def gap_and_warnings(monkeypatch, mode, *argv):
    said = []
    monkeypatch.setattr(logger, "warn", said.append)
    defaults = {"total_training_steps": 600_000, "training_mode": mode, "loss_norm": "l2"}
    settings = parse("", *TRAINING_SECTIONS, argv=argv, **defaults)
    apply_objective_defaults(settings)
    kind = OBJECTIVES[mode]
    objective = kind.from_flags(diffusion_from(settings, kind.distillation), settings.values)
    said.clear()
    warn_of_rounding(settings, objective)
    return objective.least_gap(600_000), said


@pytest.mark.parametrize("mode, argv, gap, warned", [
    ("ict", BF16, 0.0071, True), ("ict", ("--precision", "fp32"), 0.0071, False), ("ict", (), 0.0071, False),
    ("ict", (*BF16, "--end_scales", "40"), 0.205, False),
    ("ect", BF16, 0.017, True), ("ect", (*BF16, "--stages", "6"), 0.068, False),
    ("ect", (*BF16, "--shrink_q", "256", "--stages", "1"), 0.017, True),
    ("alphaflow", BF16, 0.005, True), ("alphaflow", (*BF16, "--alpha_end", "0.1"), 0.1, False),
    ("consistency_distillation", BF16, 0.205, False), ("meanflow", BF16, 1, False),
    ("consistency_training", (*BF16, *CT, "--end_scales", "200"), 0.043, True),
    ("consistency_training", (*BF16, *CT, "--end_scales", "100"), 0.084, False),
])
def test_who_is_warned(monkeypatch, mode, argv, gap, warned):
    found, said = gap_and_warnings(monkeypatch, mode, *argv)
    assert found == pytest.approx(gap, rel=0.05) and len(said) == warned
    assert all("--precision fp32" in line and f"--training_mode {mode}" in line for line in said)


def test_the_quickstarts_plan_gives_no_reason_to(monkeypatch):
    flags = [f"--{name}={value}" for name, value in METHODS["ect"](5000, "bf16").items() if name != "training_mode"]
    found, said = gap_and_warnings(monkeypatch, "ect", *BF16, *flags)
    assert found > CLOSEST and not said and METHODS["ect"](5000, "fp32")["stages"] == 8


def test_at_close_levels_the_rounding_of_bf16_is_as_large_as_the_difference():
    th.manual_seed(0)
    model = build_network(NetworkConfig(
        image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4", arch="ddpmpp",
    ))
    with th.no_grad():
        for param in model.parameters():
            param.add_(0.05 * th.randn_like(param))
    D, (x0, z) = Diffusion(time_scale=1.0).bind(model.eval()), th.randn(2, 16, 3, 8, 8)

    @th.no_grad()
    def change(t, r):
        return D(x0 + append_dims(t, 4) * z, t) - D(x0 + append_dims(r, 4) * z, r)

    def error(gap):
        t = th.linspace(0.1, 10, 16)
        exact = change(t, t * (1 - gap))
        with th.autocast("cpu", dtype=th.bfloat16, cache_enabled=False):
            rounded = change(t, t * (1 - gap))
        return ((rounded - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).median().item()

    assert error(0.3) < 0.15 < 0.5 < error(0.0071)
