"""The lines that a training run prints when it starts and when it ends."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import numpy as np
import torch as th

from cm.checkpoints import dcp, file_names
from cm.config.flags import Settings
from cm.data.class_names import worth_keeping
from cm.data.image_source import ImageSource
from cm.data.streams import ImageStream
from cm.distributed import setup as dist
from cm.io.storage import write_json
from cm.io.terminal import printable, size_text
from cm.logging import logger
from cm.setup.callbacks import sampling_settings
from cm.setup.dry_run import memory_of
from cm.setup.model import model_from
from cm.setup.run import run_precision
from cm.training.callbacks import Evaluation
from cm.training.loop import TrainLoop

CLASSES_FILE = "classes.json"
CLASSES_SHOWN = 5
SAMPLE_SCRIPT = "image_sample.py"
SAMPLES_SHOWN = 64                                          # images of the command in the last line


def data_line(source: ImageSource | ImageStream, class_cond: bool, channels: int = 3) -> str:
    """'8 images of D, classes from sub-folders: cat 3, dog 5', with at most `CLASSES_SHOWN` of the classes.

    :param class_cond: whether the network is conditioned on them.
    :param channels: of the images that it sees.
    """
    if not isinstance(source, ImageSource):
        grey = "; images in colour are converted to their luma" if channels == 1 else ""
        return f"{source.num_parts} shard(s) of {printable(source.data_dir)}, read one after the other{grey}"
    place = printable(source.data_dir) + (f" ({source.note})" if source.note else "")
    if not class_cond:
        return f"{len(source)} images of {place}, without classes (class_cond=False)"
    if source.labels is None:
        return f"{len(source)} images of {place}, without classes ({printable(source.no_labels)})"
    counts = np.bincount(source.labels, minlength=source.num_classes or 0)
    names = source.class_names or [str(number) for number in range(len(counts))]
    words = [f"{printable(name)} {count}" for name, count in zip(names[:CLASSES_SHOWN], counts)]
    more = [f"and {len(counts) - CLASSES_SHOWN} more"] if len(counts) > CLASSES_SHOWN else []
    return f"{len(source)} images of {place}, classes from {source.labels_from}: {', '.join([*words, *more])}"


def keep_classes(source: ImageSource | ImageStream, class_cond: bool) -> None:
    """Write the classes of a run and their numbers of images to its folder, for the report. Call it on one rank."""
    path = os.path.join(logger.get_dir(), CLASSES_FILE)
    if not class_cond or not isinstance(source, ImageSource) or source.labels is None:
        return
    counts = np.bincount(source.labels, minlength=source.num_classes or 0).tolist()
    names = worth_keeping(source.class_names) or [str(number) for number in range(len(counts))]
    write_json(path, {"images": len(source), "classes": dict(zip(names, counts))})


def start_line(settings: Settings, loop: TrainLoop, source: ImageSource | ImageStream) -> str:
    """The first line of a run: its data, network, ranks and memory. Call it on one rank."""
    data = data_line(source, settings.values["class_cond"], settings.values["channels"])
    with th.device("meta"):
        model = model_from(settings)
    plan, kept, images = memory_of(settings, model)
    held = sum(plan.device.values())
    ranks, threads = dist.get_world_size(), th.get_num_threads()
    begins = f"resumes at step {loop.step}" if loop.step else "starts"
    return (
        f"training {begins}, to step {loop.total_training_steps}: {data}; "
        f"{sum(param.numel() for param in model.parameters()):,} parameters; {ranks} rank{'s' * (ranks > 1)} with "
        f"{threads} thread{'s' * (threads > 1)} on {dist.dev()}, {run_precision(settings)}; memory of a rank: "
        f"{size_text(held)}, and about {size_text(kept)} for {images} images at a time"
    )


def end_line(settings: Settings, loop: TrainLoop) -> str:
    """The last line of a finished run: its best weights, and the command to sample them. Call it on one rank."""
    best, path = best_weights(loop)
    return f"training is finished at step {loop.step}; {best}{path}. To sample it: {sampling_command(settings, path)}"


def best_weights(loop: TrainLoop) -> tuple[str, str]:
    """The reason for a choice of weights, and their file: the best evaluation, else the last average or network."""
    for callback in loop.callbacks:
        if isinstance(callback, Evaluation) and (best := callback.best):
            path = os.path.join(callback.folder(), file_names.file_name(f"ema_{callback.sampler.rate}", best["step"]))
            return f"the best, {callback.metric.label} {best['value']:.6g} of step {best['step']}, is ", path
    names = [f"ema_{rate}" for rate in loop.ema_rate] or ["model"]
    suffix = dcp.SUFFIX if loop.config.checkpoint_format == "dcp" else ".pt"
    path = os.path.join(loop.checkpoints.directory, file_names.file_name(names[0], loop.step, suffix))
    return "nothing was evaluated, the newest is ", path


def sampling_command(settings: Settings, path: str) -> str:
    """A command for a shell that generates a few images with the sampler of the run's evaluations."""
    drawing = sampling_settings(settings).values
    own = {name: drawing[name] for name in ("sampler", "seed")}
    if drawing["sampler"] != "onestep":
        own["steps"] = drawing["steps"]
    if drawing["ts"]:
        own["ts"] = drawing["ts"]
    if settings.values["vae"]:
        own["vae"] = settings.values["vae"]
    folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    if not os.path.exists(os.path.join(folder, SAMPLE_SCRIPT)):
        folder = str(Path(__file__).resolve().parents[2] / "scripts")
    drawn = os.path.join(logger.get_dir(), "samples_drawn")
    flags = {"model_path": path, **own, "num_samples": SAMPLES_SHOWN, "log_dir": drawn}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return shlex.join([sys.executable, os.path.relpath(os.path.join(folder, SAMPLE_SCRIPT)), *words])
