"""Print the table of docs/memory.md: GPU memory during consistency distillation with the presets, in GiB.

python benchmarks/memory_table.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch as th
from torch import nn

from cm.config.flags import Settings, parse
from cm.config.objective_schema import ConsistencyConfig
from cm.config.schema import DataConfig, DiffusionConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from cm.setup.dry_run import planned_run
from cm.setup.model import model_from
from cm.training.memory_estimate import GIB, activations, plan

PRESETS = {"ImageNet-64": "configs/imagenet64/cd.yaml", "LSUN-256": "configs/lsun256/cd.yaml"}
RANKS = (1, 8, 64)
IMAGES = 8                                                  # of a microbatch
LAYOUTS = (                                                 # each in addition to those above it
    (),
    ("--use_fp16", "False", "--precision", "bf16"),
    ("--shard_ema", "True"),
    ("--shard_optimizer", "True"),
    ("--ema_device", "cpu"),
)
SHARDED = ("--use_fp16", "False", "--precision", "bf16", "--parallel", "fsdp")


def settings_of(preset: str, *flags: str) -> Settings:
    sections = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig, ConsistencyConfig, EvalConfig, RunConfig)
    path = Path(__file__).resolve().parent.parent / preset
    return parse(__doc__, *sections, argv=["--config", str(path), *flags])


def table(name: str) -> list[str]:
    """The rows of a preset, with one more for the activations in each precision."""
    rows, flags = [], []
    settings = settings_of(PRESETS[name])
    with th.device("meta"):
        model = model_from(settings)
    for layout in LAYOUTS:
        flags += layout
        cells = [held(name, model, flags, ranks) for ranks in RANKS]
        words = f"and `{' '.join(layout)}`" if layout else "the preset: fp16, nothing shared"
        rows.append(f"| {name} | {words} | {' | '.join(cells)} |")
    cells = ["" if ranks == 1 else held(name, model, SHARDED, ranks) for ranks in RANKS]
    rows.append(f"| {name} | only `{' '.join(SHARDED)}` | {' | '.join(cells)} |")
    for precision in ("fp16", "bf16"):
        kept = activations(model, IMAGES, settings.values["image_size"], precision, settings.values["class_cond"])
        size = f"{kept / GIB:.2f}"
        rows.append(f"| {name} | estimate: activations of {IMAGES} images, {precision} | {' | '.join([size] * 3)} |")
    return rows


def held(name: str, model: nn.Module, flags: Sequence[str], ranks: int) -> str:
    """GiB of one rank of a preset with other flags."""
    run, _ = planned_run(settings_of(PRESETS[name], *flags, "--dry_run_ranks", str(ranks)))
    return f"{sum(plan(model, run).device.values()) / GIB:.2f}"


def main() -> None:
    print(f"| network | flags | {' | '.join(f'{ranks} GPU' + 's' * (ranks > 1) for ranks in RANKS)} |")
    print("|---|---|---:|---:|---:|")
    for name in PRESETS:
        print("\n".join(table(name)), flush=True)


if __name__ == "__main__":
    main()
