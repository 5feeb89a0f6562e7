"""Train from Python, in one process: flags are keyword arguments, and the trained model is a pipeline."""

from __future__ import annotations

import os

from cm.config.flags import Settings, give, parse
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.pipeline.loading import load_pipeline
from cm.pipeline.pipeline import Pipeline
from cm.setup.run_facts import COMMANDS
from cm.setup.train import train


def train_model(log_dir: str | os.PathLike[str], *, training_mode: str = "edm", **flags: object) -> Pipeline:
    """Train a model, or resume its training, and load it; `cm.train` describes the arguments.

    :raises UserError: for a flag that does not exist or cannot be used, and for files that cannot be used.
    """
    train(training_settings({"log_dir": os.fspath(log_dir), "training_mode": training_mode, **flags}))
    return load_pipeline(log_dir)


def training_settings(flags: dict[str, object]) -> Settings:
    """The settings of a training command with these flags.

    :raises UserError: for a flag that does not exist, or a value that it does not allow.
    """
    if flags.get("checkpoint_dir"):
        raise UserError(f"checkpoint_dir={flags['checkpoint_dir']!r}: a run from Python keeps its checkpoints in "
                        "log_dir; drop it, or use the command")
    _, defaults = COMMANDS[flags["training_mode"] == "edm"]
    settings = parse("", *TRAINING_SECTIONS, argv=[], **defaults)
    give(settings, flags, *TRAINING_SECTIONS)
    return settings
