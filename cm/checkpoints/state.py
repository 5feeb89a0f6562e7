"""The checkpoints of a run.

A checkpoint is the files of one step, under the names that guided-diffusion's users know (model000010.pt,
ema_0.9999_000010.pt, opt000010.pt, target_model000010.pt), and a manifest, checkpoint_000010.json, that is written
last. The manifest lists the files with size and checksum and holds the resolved flags of the run, so it is also the
sidecar from which a sampler learns the architecture. A step whose manifest is missing or does not match its files
does not exist.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cm import logger
from cm.checkpoints import storage
from cm.registry import UserError

FORMAT = 1
MANIFEST = re.compile(r"checkpoint_(\d{6,})\.json")
WEIGHTS = re.compile(r"(model|opt|trainer|target_model|teacher_model|ema_[\d.]+(?:kimg)?_)(\d{6,})\.pt")


def file_name(name: str, step: int) -> str:
    """('model', 10) -> 'model000010.pt'; ('ema_0.9999', 10) -> 'ema_0.9999_000010.pt'."""
    return f"{name}_{step:06d}.pt" if name.startswith("ema_") else f"{name}{step:06d}.pt"


def parse_name(path: str) -> tuple[str, int] | None:
    """The inverse of `file_name`; None for a file of another name. Folders do not matter."""
    match = WEIGHTS.fullmatch(os.path.basename(path))
    return (match[1].removesuffix("_"), int(match[2])) if match else None


def manifest_name(step: int) -> str:
    return f"checkpoint_{step:06d}.json"


def list_files(directory: str) -> list[str]:
    """Names of all files of checkpoints there, complete or not."""
    def belongs(name: str) -> bool:
        return bool(MANIFEST.fullmatch(name) or parse_name(name))

    return [name for name in storage.list_names(directory) if belongs(name.removesuffix(".partial"))]


@dataclass(frozen=True)
class Checkpoint:
    """One complete step of a run."""

    directory: str
    step: int
    images_seen: int
    config: dict[str, Any]
    files: dict[str, dict[str, int]]            # file name -> {"size": bytes, "crc32": checksum}

    def path(self, name: str) -> str | None:
        """Where the file of `name` lies ('model', 'opt', 'ema_0.9999'); None if the checkpoint has none."""
        file = file_name(name, self.step)
        return storage.join(self.directory, file) if file in self.files else None

    def names(self) -> list[str]:
        return [parsed[0] for file in self.files if (parsed := parse_name(file))]

    def problem(self) -> str | None:
        """What is wrong with the files, or None."""
        for file, expected in self.files.items():
            path = storage.join(self.directory, file)
            if not storage.exists(path):
                return f"{file} is missing"
            if storage.checksum(path) != expected:
                return f"{file} is truncated or damaged (size or checksum differ from the manifest)"
        return None


def save(
    directory: str, step: int, content: Mapping[str, Any], config: Mapping[str, Any], images_seen: int
) -> Checkpoint:
    """Write a checkpoint; call it on one rank.

    :param content: name ('model', 'ema_0.9999', 'opt', ...) -> what `torch.save` is to write.
    :raises UserError: if something cannot be written; earlier checkpoints stay as they are.
    """
    files = {}
    for name, tensors in content.items():
        file = file_name(name, step)
        files[file] = storage.save_tensors(storage.join(directory, file), tensors)
    manifest = {"format": FORMAT, "step": step, "images_seen": images_seen, "files": files, "config": dict(config)}
    text = json.dumps(manifest, indent=2).encode()
    storage.write_whole(storage.join(directory, manifest_name(step)), lambda file: file.write(text))
    return Checkpoint(directory, step, images_seen, dict(config), files)


def read(path: str) -> Checkpoint:
    """Read a manifest.

    :raises UserError: if it is not one.
    """
    try:
        with storage.open_file(path) as file:
            content = json.loads(file.read())
        return Checkpoint(
            os.path.dirname(path), int(content["step"]), int(content["images_seen"]), dict(content["config"]),
            dict(content["files"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of a checkpoint: {type(error).__name__}: {error}") from None


def newest(directory: str) -> Checkpoint | None:
    """The newest complete checkpoint of a folder; damaged ones are passed over with a warning."""
    names = [name for name in storage.list_names(directory) if MANIFEST.fullmatch(name)]
    for name in sorted(names, key=lambda name: int(MANIFEST.fullmatch(name)[1]), reverse=True):
        try:
            checkpoint = read(storage.join(directory, name))
            problem = checkpoint.problem()
        except UserError as error:
            problem = str(error)
        if problem is None:
            return checkpoint
        logger.warn(f"passing over {name} in {directory}: {problem}")
    return None


def beside(path: str) -> Checkpoint | None:
    """The checkpoint that a weights file belongs to, if its manifest lies beside it."""
    parsed = parse_name(path)
    if parsed is None:
        return None
    manifest = storage.join(os.path.dirname(path), manifest_name(parsed[1]))
    return read(manifest) if storage.exists(manifest) else None


def sweep(directory: str) -> None:
    """Remove what a killed save left behind."""
    if not storage.is_remote(directory):
        for name in storage.list_names(directory):
            if name.endswith(".partial"):
                os.remove(os.path.join(directory, name))
