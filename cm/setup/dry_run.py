"""--dry_run: the resolved run, the memory that it takes, and whether it could start; nothing is written."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from typing import Any

import numpy as np
import torch as th

from cm.checkpoints import loading, manifest
from cm.checkpoints.formats import autoencoder_kl
from cm.checkpoints.manager import resolve_resume
from cm.config.flags import Settings
from cm.config.schema import TrainConfig
from cm.data import latents
from cm.data.class_names import ClassNames, require_same
from cm.data.image_source import ImageSource
from cm.data.streams import ImageStream
from cm.distributed import setup as dist
from cm.distributed.layout import choose_shard_size
from cm.errors import UserError
from cm.io import storage
from cm.io.terminal import size_text
from cm.logging import logger
from cm.networks.build import Network
from cm.setup.data import open_data, share_of_batch
from cm.setup.latents import load_decoder
from cm.setup.model import diffusion_from, model_from
from cm.setup.objective import objective_kind
from cm.setup.run import check_log_dirs, run_precision
from cm.training.ema_rates import parse_rates
from cm.training.master_weights import store_as_computed
from cm.training.memory_estimate import GIB, MemoryPlan, PlannedRun, activations, line, nbytes, plan
from cm.training.same_run import require_same_run
from cm.training.state import load_part
from evaluations.engine.readers import BatchFile

STARTS = ("model_path", "source", "teacher_model_path", "resume_checkpoint")
"""Flags that name weights of the run's own network."""
DECODED = 4                                                 # images that are read from the data
LARGEST_GPU = 192 * GIB                                     # of one GPU, today


def dry_run(settings: Settings) -> None:
    """Print the resolved run as JSON, with the network's size; then check what it would read and write.

    Of a training run also the memory that it takes on the fullest rank, in bytes, and on stderr as a table.

    :raises UserError: on every rank, where the run would: see `check_weights` and `check_training`.
    """
    with th.device("meta"):
        model = model_from(settings)
    facts: dict[str, Any] = {
        "parameters": sum(param.numel() for param in model.parameters()), "ranks": dist.get_world_size()
    }
    machines = dist.all_gather_object(platform.node())
    if dist.is_main():
        print_plan(settings, model, facts, machines.count(machines[0]))
    with contextlib.redirect_stdout(sys.stderr):            # the JSON stays alone on stdout
        dist.on_main(check_log_dirs, settings)
        check_weights(settings, model)
        if is_training(settings):
            check_training(settings, model)


def is_training(settings: Settings) -> bool:
    """Whether the flags are those of a training command."""
    return "ema_rate" in settings.values


def print_plan(settings: Settings, model: Network, facts: dict[str, Any], here: int) -> None:
    """Print the resolved run, and for a training run its memory; for one rank.

    :param facts: what else belongs into the JSON.
    :param here: ranks on this machine.
    """
    if is_training(settings):
        memory, kept, images = memory_of(settings, model)
        ranks = settings.values["dry_run_ranks"] or dist.get_world_size()
        facts["memory"] = {
            "ranks": ranks, **memory.as_dict(), "activations_estimate": kept, "images_per_pass": images
        }
        print(f"memory of one of {ranks} ranks\n{memory.table()}", file=sys.stderr)
        print(line(f"estimate: {images} images at a time", kept), file=sys.stderr)
        if warning := memory_warning(settings, sum(memory.device.values()), kept, images, here):
            print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(settings.values | facts, indent=2))


def memory_warning(settings: Settings, held: int, kept: int, images: int, here: int = 1) -> str:
    """What to say of a run that needs more memory than there is; empty if it fits, for one rank.

    :param held, kept: bytes of a rank between its steps, and of a forward pass of so many images.
    :param here: ranks on this machine.
    """
    ranks, where = 1, "a GPU of this machine has free"
    if settings.values["dry_run_ranks"]:
        available, where = LARGEST_GPU, "the largest GPUs have"
    elif dist.dev().type == "cuda":
        available = th.cuda.mem_get_info(dist.dev())[0]
    else:
        ranks = here
        available, where = free_memory(), f"this machine has free for its {ranks} rank{'s' * (ranks > 1)}"
    if available is None or (held + kept) * ranks <= available:
        return ""
    fits = int(images * max(0, available / ranks - held) / kept) if kept else 0
    advice = f"give --microbatch {fits} or less" if fits >= 1 else (
        "--microbatch 1 alone is not enough: a smaller network, or see docs/memory.md")
    return (f"a rank needs {size_text(held)} and about {size_text(kept)} for {images} images at a time, and {where} "
            f"{size_text(available)}: {advice}; --use_checkpoint True takes less, too")


def free_memory() -> int | None:
    """Bytes of memory that this machine could give now; None where that is not known."""
    try:
        with open("/proc/meminfo") as file:
            rows = dict(row.split(":", 1) for row in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_weights(settings: Settings, model: Network) -> None:
    """Read every file of weights that the run starts from, as it would.

    :param model: the network on the meta device.
    :raises UserError: on every rank, for one that is missing, damaged, or of another network.
    """
    for flag, source in settings.sources.items():
        if flag not in STARTS:                              # of another network, or a manifest, which is read elsewhere
            continue
        if not dist.on_main(storage.exists, source.path):
            raise UserError(f"--{flag} {source.path}: no such file")
        loading.check(model, source.take(), source.path)


def check_training(settings: Settings, model: Network) -> None:
    """Check the data and the checkpoint of a training run.

    :param model: the network on the meta device.
    :raises UserError: on every rank, with the message of the run itself.
    """
    values = settings.values
    kind = objective_kind(values)
    objective = kind.from_flags(diffusion_from(settings, kind.distillation), values)
    data = open_data(settings, references=objective.references)
    dist.on_main(decode_first, data.source)
    check_resume(settings, model, data.class_names)
    load_decoder(settings, th.device("cpu"))
    if values["eval_interval"]:
        dist.on_main(lambda: len(BatchFile(values["eval_ref"])))


def decode_first(source: ImageSource | ImageStream) -> None:
    """Read the first images of the data; for one rank.

    :raises UserError: if one cannot be read.
    """
    if isinstance(source, ImageSource):
        source.images(np.arange(min(DECODED, len(source))))
    else:
        next(source.items(0))


def check_resume(settings: Settings, model: Network, class_names: ClassNames) -> None:
    """Find and read the checkpoint that a training run would resume from, if there is one.

    :raises UserError: on every rank, for one that is damaged, or of another network or other classes.
    """
    values, verify = settings.values, settings.values["verify_weights"]
    directory = values["checkpoint_dir"] or values["log_dir"] or os.environ.get("OPENAI_LOGDIR", "")
    found = None
    if directory:
        found = dist.on_main(resolve_resume, directory, values["resume"], verify, True)
    elif values["resume"] not in ("auto", "never"):
        found = dist.on_main(manifest.find, values["resume"], verify)
    if found:
        require_same_run(found, values, values["resume"])
        allowed = values["allow_other_classes"]
        if warning := require_same(found.class_names, class_names, found.manifest, values["data_dir"], allowed):
            logger.warn(warning)
        latents.require_same(found.config.get("latents", ""), values.get("latents", ""), (found.manifest, "this run"))
        loading.check(model, load_part("model", found, verify), found.path("model") or "")


def memory_of(settings: Settings, model: Network) -> tuple[MemoryPlan, int, int]:
    """What a training run holds between its steps, about how many bytes a forward pass keeps, and of how many images.

    :param model: its network on the meta device.
    """
    run, images = planned_run(settings)
    values = settings.values
    kept = activations(model, images, values["image_size"], run.precision, values["class_cond"], values["channels"])
    return plan(model, run), kept, images


def planned_run(settings: Settings) -> tuple[PlannedRun, int]:
    """The facts about the memory of a training run that its flags determine, and the images of a forward pass."""
    train = settings.section(TrainConfig)
    ranks = train.dry_run_ranks or dist.get_world_size()
    images, _ = share_of_batch(train.global_batch_size, train.batch_size, 0, ranks)
    kind = objective_kind(settings.values)
    run = PlannedRun(
        precision=run_precision(settings),
        optimizer=train.optimizer,
        ema_rates=[rate.name for rate in parse_rates(train.ema_rate)],
        ranks=ranks,
        ema_device=train.ema_device,
        shard_ema=train.shard_ema,
        shard_optimizer=train.shard_optimizer,
        shards=planned_shards(train.parallel, train.shard_size, ranks),
        accumulates=0 < train.microbatch < images,
        async_save=train.async_save,
        companions={each.name: each.changes for each in kind.companions_of(settings.values)},
        stores_casts=not kind.full_precision_passes,
        guide=guide_bytes(settings),
        decoder=autoencoder_kl.held_bytes(settings.values["vae"]) if settings.values.get("vae") else 0,
        on_gpu=train.dry_run_ranks > 0 or dist.dev().type == "cuda",
    )
    return run, min(images, train.microbatch) if train.microbatch > 0 else images


def planned_shards(parallel: str, shard_size: int, ranks: int) -> int:
    """The number of ranks among which the networks of a run are divided; 1 for none.

    :raises UserError: for a size that does not divide the ranks.
    """
    if parallel == "ddp":
        return 1
    return choose_shard_size(shard_size, ranks, [ranks]) if parallel == "hsdp" else ranks


def guide_bytes(settings: Settings) -> int:
    """Memory of the network that guides the teacher; 0 where there is none, or it is the teacher itself."""
    guide = settings.sources.get("teacher_guide")
    if guide is None or guide.settings is None or guide.scale == 1:
        return 0
    with th.device("meta"):
        model = model_from(guide.settings)
    store_as_computed(model, run_precision(settings), not objective_kind(settings.values).full_precision_passes)
    return nbytes([*model.parameters(), *model.buffers()])
