"""A small training loop of every objective, on any device."""

import torch as th

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.objectives import DENOISING, OBJECTIVES
from cm.script_util import create_model
from cm.setup.model import diffusion_from
from cm.setup.objective import apply_objective_defaults, apply_precond_defaults, objective_kind
from cm.training.config import CompanionNetwork, LoopConfig, RunParts
from cm.training.loop import TrainLoop
from cm.types import Batch

SHAPE = (4, 3, 8, 8)
DENOISERS = {f"edm, {name}": ("--training_mode", "edm", "--objective", name) for name in DENOISING}
DENOISERS["edm, uncertainty"] += ("--arch", "edm2")         # whose network estimates it
OTHERS = {name: ("--training_mode", name) for name in OBJECTIVES if name != "edm"}
OBJECTIVE_FLAGS = DENOISERS | OTHERS


def network(device, second_time=False, arch="unet"):
    th.manual_seed(0)
    return create_model(
        8, 32, 1, "1", class_cond=True, num_classes=3, attention_resolutions="8", num_head_channels=32,
        second_time=second_time, arch=arch,
    ).to(device)


def loop_of(device, *argv, **options):
    """The training loop of flags, and a batch for it, which lies on the CPU as the loader gives it."""
    settings = parse("", *TRAINING_SECTIONS, argv=argv, total_training_steps=100, loss_norm="l2")
    apply_objective_defaults(settings)
    apply_precond_defaults(settings)
    kind = objective_kind(settings.values)
    diffusion = diffusion_from(settings, kind.distillation)
    objective = kind.from_flags(diffusion, settings.values)
    companions = {}
    for each in objective.companions:
        model = network(device, kind.second_time and each.origin != "teacher")
        model.requires_grad_(each.changes == "trained")
        companions[each.name] = CompanionNetwork(model, diffusion_from(settings, each.distillation))
    config = LoopConfig(**dict(
        batch_size=4, lr=1e-3, ema_rate="0.5,0.9", total_training_steps=100, log_interval=1, save_interval=100,
    ) | options)
    online = network(device, kind.second_time, settings.values["arch"])
    parts = RunParts(online, diffusion, objective, iter(()), companions)
    return TrainLoop(config, parts), batch_for(min(objective.references, 8))


def batch_for(references):
    batch = Batch(th.rand(SHAPE) * 2 - 1, {"y": th.tensor([0, 1, 2, 0])}, th.arange(4), th.arange(4))
    if references:
        pixels = th.randint(0, 256, (references, *SHAPE[1:]), dtype=th.uint8)
        places = th.arange(references) + 100
        batch.references = Batch(pixels, {"y": th.zeros(references, dtype=th.long)}, places, places)
    return batch
