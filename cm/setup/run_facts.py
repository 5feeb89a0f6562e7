"""How weights were made, according to the files next to them: facts for a model card, and the training command."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from cm.checkpoints import manifest
from cm.checkpoints.formats import described, hub_folder
from cm.config.flags import defaults_of
from cm.config.plugin_flags import with_registered
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.io import budget, storage
from cm.io.web import is_address
from cm.objectives import OBJECTIVES
from cm.report.run_facts import Measurement, RunFacts, measurements_of
from cm.setup.objective import flags_of_objectives, objective_kind
from cm.training.callbacks import BEST, BEST_FILE

CLASSES = "classes.json"                                            # of a run, see `cm.setup.announce`
COMMANDS: dict[bool, tuple[str, dict[str, Any]]] = {
    True: ("cm-train", {"training_mode": "edm"}),
    False: ("cm-distill", {"schedule_sampler": "uniform", "total_training_steps": 600_000}),
}
"""Whether it is a diffusion model -> the command that trains it, and its defaults where they differ from the flags'."""
OF_THE_MACHINE = ("log_dir", "checkpoint_dir", "resume", "log_formats", "device")


def facts_of(path: str) -> RunFacts:
    """How the weights of a file or folder were made, as far as it is known; for one rank.

    :raises UserError: if what describes the weights is damaged.
    """
    if hub_folder.is_folder(path):
        return hub_folder.description(path).facts
    if described.claims(path):
        about = described.description(path)
        return about.facts if about else RunFacts()
    checkpoint = manifest.beside(path)
    if checkpoint is None or not (checkpoint.step or checkpoint.images_seen):
        return RunFacts()
    folder = os.path.dirname(path)
    run = os.path.dirname(folder) if os.path.basename(folder) == BEST else folder
    return RunFacts(
        data=last_part(str(checkpoint.config.get("data_dir", ""))), images=_images_of(_object(run, CLASSES)),
        step=checkpoint.step, images_seen=checkpoint.images_seen, seconds=checkpoint.seconds,
        command=training_command(checkpoint.config), measured=tuple(_best_of(_object(run, BEST_FILE), path)),
    )


def measured_in(paths: Iterable[str]) -> list[Measurement]:
    """The results in files that evaluator.py and fid.py wrote with --json.

    :raises UserError: if one cannot be read, or holds no result.
    """
    found = []
    for path in paths:
        try:
            content = budget.read_json(path, budget.SETTINGS)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        rows = list(measurements_of(content)) if isinstance(content, dict) else []
        if not rows:
            raise UserError(f"{path} contains no result: give a file that evaluator.py or fid.py wrote with "
                            "--json")
        found += rows
    return found


def last_part(value: str) -> str:
    """The name of a file or an address without where it lies, which may say more than is meant for others."""
    if is_address(value) or storage.is_remote(value):
        value = value.partition("#")[0].partition("?")[0]
    return PurePosixPath(value).name if "/" in value else value


def training_command(config: Mapping[str, Any]) -> str:
    """The command that trains what the flags of a manifest describe; empty where they are none of a training run.

    Flags at their defaults are left out, and so are those of other objectives and of the machine.
    """
    command, own = COMMANDS[config.get("training_mode") == "edm"]
    defaults = {name: value for section in with_registered(TRAINING_SECTIONS)
                for name, value in defaults_of(section).items()} | own
    if "data_dir" not in config or str(config.get("training_mode")) not in OBJECTIVES:
        return ""
    values = defaults | {name: value for name, value in config.items() if name in defaults}
    try:
        used = set(objective_kind(values).options_of(values))
    except (UserError, KeyError):                                   # flags of another version or a plugin
        return ""
    unused = flags_of_objectives().keys() - used
    words = [
        word for name, value in values.items()
        if value != defaults[name] and name not in unused and name not in OF_THE_MACHINE
        for word in (f"--{name}", last_part(str(value)))
    ]
    return shlex.join([command, *words])


def _best_of(best: Mapping[str, Any], path: str) -> Iterable[Measurement]:
    """The evaluation during training, if it was of these weights."""
    settings, value = best.get("settings"), best.get("value")
    is_of_these = os.path.basename(str(best.get("file", ""))) == os.path.basename(path)
    if is_of_these and isinstance(settings, dict) and isinstance(value, (int, float)):
        images, extractor = settings.get("num_samples"), settings.get("features", "")
        yield Measurement(str(best.get("metric", "")), float(value), images if type(images) is int else 0,
                          str(extractor))


def _images_of(classes: Mapping[str, Any]) -> int:
    images = classes.get("images", 0)
    return images if type(images) is int and images > 0 else 0


def _object(folder: str, name: str) -> dict[str, Any]:
    """The object in a file of a run; empty where there is none that can be read."""
    path = os.path.join(folder, name)
    if storage.is_remote(folder) or not os.path.exists(path):
        return {}
    try:
        content = budget.read_json(path, budget.SETTINGS)
    except (OSError, ValueError, UserError):
        return {}
    return content if isinstance(content, dict) else {}
