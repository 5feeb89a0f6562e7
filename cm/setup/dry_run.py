"""--dry_run: the resolved run and the memory that it takes, before anything is read or written."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch as th

from cm.config.flags import Settings
from cm.config.schema import TrainConfig
from cm.distributed import setup as dist
from cm.setup.data import share_of_batch
from cm.setup.model import model_from
from cm.setup.objective import objective_kind
from cm.setup.run import run_precision
from cm.training.ema_rates import parse_rates
from cm.training.memory_estimate import PlannedRun, activations, line, nbytes, plan
from cm.training.mixed_precision import halve


def dry_run(settings: Settings) -> None:
    """Print the resolved run as JSON, with the network's size, and do nothing.

    Of a training run also the memory that it takes on the fullest rank, in bytes, and on stderr as a table.
    """
    with th.device("meta"):
        model = model_from(settings)
    facts: dict[str, Any] = {
        "parameters": sum(param.numel() for param in model.parameters()), "ranks": dist.get_world_size()
    }
    if not dist.is_main():
        return
    if "ema_rate" in settings.values:
        run, images = planned_run(settings)
        memory = plan(model, run)
        kept = activations(
            model, images, settings.values["image_size"], run.precision, settings.values["class_cond"],
            settings.values["channels"],
        )
        facts["memory"] = {
            "ranks": run.ranks, **memory.as_dict(), "activations_estimate": kept, "images_per_pass": images
        }
        print(f"memory of one of {run.ranks} ranks\n{memory.table()}", file=sys.stderr)
        print(line(f"estimate: {images} images at a time", kept), file=sys.stderr)
    print(json.dumps(settings.values | facts, indent=2))


def planned_run(settings: Settings) -> tuple[PlannedRun, int]:
    """What the flags of a training run say about its memory, and the images of a forward pass."""
    train = settings.section(TrainConfig)
    ranks = train.dry_run_ranks or dist.get_world_size()
    images, _ = share_of_batch(train.global_batch_size, train.batch_size, 0, ranks)
    run = PlannedRun(
        precision=run_precision(settings),
        optimizer=train.optimizer,
        ema_rates=[rate.name for rate in parse_rates(train.ema_rate)],
        ranks=ranks,
        ema_device=train.ema_device,
        shard_ema=train.shard_ema,
        shard_optimizer=train.shard_optimizer,
        companions={each.name: each.changes for each in objective_kind(settings.values).companions_of(settings.values)},
        guide=guide_bytes(settings),
        on_gpu=train.dry_run_ranks > 0 or dist.dev().type == "cuda",
    )
    return run, min(images, train.microbatch) if train.microbatch > 0 else images


def guide_bytes(settings: Settings) -> int:
    """Memory of the network that guides the teacher; 0 where there is none, or it is the teacher itself."""
    guide = settings.sources.get("teacher_guide")
    if guide is None or guide.settings is None or guide.scale == 1:
        return 0
    with th.device("meta"):
        model = model_from(guide.settings)
    if run_precision(settings) == "fp16":
        halve(model)
    return nbytes([*model.parameters(), *model.buffers()])
