"""Whether a run can be divided among its ranks as --parallel asks, checked before anything is opened."""

from __future__ import annotations

from cm.config.flags import Settings
from cm.config.schema import TrainConfig
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage
from cm.setup.guide import DISTILLING
from cm.setup.run import run_precision
from cm.training.engine import check_sharded


def check_parallel(settings: Settings) -> None:
    """Networks in shards, and how they are saved, go together with the other flags.

    :raises UserError: if not, naming the flag.
    """
    train, values = settings.section(TrainConfig), settings.values
    if train.parallel != "hsdp" and train.shard_size:
        raise UserError(f"--shard_size {train.shard_size} is for --parallel hsdp, and this run has --parallel "
                        f"{train.parallel}; drop one of them")
    if train.async_save and train.checkpoint_format != "dcp":
        raise UserError("--async_save True needs --checkpoint_format dcp, where every rank writes its share; rank 0 "
                        "writes files at once")
    if train.checkpoint_format == "dcp" and storage.is_remote(train.checkpoint_dir):
        raise UserError(f"--checkpoint_format dcp writes to a disk that all ranks share, and --checkpoint_dir "
                        f"{train.checkpoint_dir} is an object store; give --checkpoint_format files, or a folder")
    if train.parallel == "ddp":
        return
    ranks = train.dry_run_ranks or dist.get_world_size()
    check_sharded(train.parallel, ranks, {
        "--precision": run_precision(settings), "--shard_ema": train.shard_ema,
        "--shard_optimizer": train.shard_optimizer, "--compile": values["compile"],
    })
    guide = settings.sources.get("teacher_guide")
    if guide is not None and guide.settings is None and values[DISTILLING.interval]:
        raise UserError(f"--{DISTILLING.interval} {values[DISTILLING.interval]} and --parallel {train.parallel}: a "
                        "rank evaluates the guide only if it has noise levels in the interval, but all ranks must run "
                        f"each pass of a sharded network together; give --{DISTILLING.path}, or drop one of them")
