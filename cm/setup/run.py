"""The folder, the log and the devices of a run."""

from __future__ import annotations

import os

import torch as th
from torch import nn

from cm.checkpoints import lock
from cm.config.flags import Settings, words_of
from cm.distributed import setup as dist
from cm.distributed import signals
from cm.errors import UserError
from cm.io import budget, storage, terminal
from cm.io.outputs import Output, check_outputs
from cm.logging import logger
from cm.networks.build import to_device
from cm.networks.compile import compile_network
from cm.setup.model import choose_precision
from cm.tensors import allow_tf32

SAMPLING_CONFIG = "sampling_config.json"                    # of a command whose log lies in the folder of a run
TRAINS = "total_training_steps"                             # the flag that only a training run has


def start_run(settings: Settings) -> None:
    """Lock the folder of a training run against a second job, and start its log.

    :raises UserError: on every rank, if another job has it.
    """
    dist.on_main(check_log_dirs, settings)
    directory = settings.values["log_dir"] or os.environ.get("OPENAI_LOGDIR", "")
    if directory and not storage.is_remote(directory):      # a new temporary folder is nobody else's
        dist.on_main(lock.take, os.path.expanduser(directory))
    signals.allow(settings.values["grace_seconds"])
    open_log(settings, with_config=False)                   # that is written when the run starts


def check_log_dirs(settings: Settings) -> None:
    """Find out whether a run can write its log and its checkpoints; for one rank.

    :raises UserError: if it cannot.
    """
    draws = settings.values.get("sample_interval")          # pictures, which would be images of the next start
    images = {"--data_dir": settings.values["data_dir"]} if draws else {}
    for name in ("log_dir", "checkpoint_dir"):              # which may be one folder
        check_outputs([Output(f"--{name}", settings.values.get(name, ""), "folder")], images)


def open_log(settings: Settings, *, with_config: bool = True) -> None:
    """Start the log in --log_dir, and write the resolved flags there."""
    also = ("stats",) if settings.values.get("tick_kimg") else ()
    formats = words_of(settings.values["log_formats"]) or None
    logger.configure(settings.values["log_dir"] or None, formats, rank=dist.get_rank(), also=also)
    if with_config:
        dist.on_main(save_config, settings)
    directory = terminal.printable(logger.get_dir())
    logger.log(f"logging to {directory} on {dist.get_world_size()} rank(s), device {dist.dev()}")
    if is_slow(settings, dist.dev()):
        logger.log("this GPU computes in float32; --precision auto (bf16) or --tf32 True would use its matrix units, "
                   "which are faster")


def is_slow(settings: Settings, device: th.device) -> bool:
    """Whether a GPU is to compute in float32 although nobody asked for it."""
    asked = any(settings.is_given(name) for name in ("precision", "use_fp16", "tf32"))
    return device.type == "cuda" and not asked and run_precision(settings, device) == "fp32"


def save_config(settings: Settings) -> None:
    """Write config.json into the log's folder, and show the flags in the log; on one rank.

    In the folder of a training run it is the run's, which says where its checkpoints are: other commands leave it.
    """
    text = settings.as_text().encode()
    name = "config.json" if TRAINS in settings.values or not _is_of_training(logger.get_dir()) else SAMPLING_CONFIG
    storage.write_atomically(os.path.join(logger.get_dir(), name), lambda file: file.write(text))
    logger.log_config(settings.values)


def _is_of_training(directory: str) -> bool:
    """Whether the config.json in a folder is of a training run."""
    try:
        return TRAINS in budget.read_json(os.path.join(directory, "config.json"), budget.SETTINGS)
    except (OSError, UserError, ValueError, TypeError):
        return False


def on_device(settings: Settings, model: nn.Module, device: th.device | None = None) -> nn.Module:
    """Put a network on a device, compiled if the flags say so; from now on, GPUs multiply as they say.

    :param device: by default this rank's.
    """
    device = device or dist.dev()
    allow_tf32(settings.values["tf32"])
    to_device(model, device)
    if settings.values["compile"]:
        compile_network(model, device)
    return model


def run_precision(settings: Settings, device: th.device | None = None) -> str:
    """The precision of the flags on a device, by default this rank's: fp32, bf16 or fp16."""
    return choose_precision(settings.values["precision"], settings.values["use_fp16"], device or dist.dev())


def trusts_extractor(settings: Settings) -> bool:
    """Whether the user has named the extractor as a program that may run.

    :raises UserError: if a file sets trust_extractor: the author of the file could have named the extractor, too.
    """
    if not settings.values["trust_extractor"]:
        return False
    if not settings.is_typed("trust_extractor"):
        raise UserError(f"{settings.given.get('trust_extractor', 'a default')} sets trust_extractor, which counts on "
                        "the command line only: add --trust_extractor there if you trust the extractor's author")
    return True
