"""The names of the files of a checkpoint, and which of them a folder holds."""

from __future__ import annotations

import os
import re

from cm.io import storage
from cm.io.atomic import PARTIAL, written_for

MANIFEST = re.compile(r"checkpoint_(\d{6,})\.json")
WEIGHTS = re.compile(
    r"((?:opt_)?(?:[a-z]+_)*model|opt|trainer|ema_(?:power|posthoc)?[\d.]+(?:kimg)?_)(\d{6,})\.(?:pt|dcp)"
)


def file_name(name: str, step: int, suffix: str = ".pt") -> str:
    """('model', 10) -> 'model000010.pt'; ('ema_0.9999', 10) -> 'ema_0.9999_000010.pt'."""
    return f"{name}_{step:06d}{suffix}" if name.startswith("ema_") else f"{name}{step:06d}{suffix}"


def parse_name(path: str) -> tuple[str, int] | None:
    """The inverse of `file_name`, from a name or a path; None for any other file."""
    match = WEIGHTS.fullmatch(os.path.basename(path))
    return (match[1].removesuffix("_"), int(match[2])) if match else None


def manifest_name(step: int) -> str:
    """10 -> 'checkpoint_000010.json'."""
    return f"checkpoint_{step:06d}.json"


def belongs(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint."""
    return bool(MANIFEST.fullmatch(name) or parse_name(name))


def final_name(name: str) -> str:
    """The name that an unfinished file will have when it is complete; the name itself for any other file."""
    return (written_for(name) or name).removesuffix(PARTIAL)


def list_files(directory: str) -> list[str]:
    """Names of all files of checkpoints in a folder, complete or not."""
    return [name for name in storage.list_names(directory) if belongs(final_name(name))]


def steps(directory: str) -> list[int]:
    """The steps with a manifest in a folder, ascending."""
    return sorted(int(match[1]) for name in storage.list_names(directory) if (match := MANIFEST.fullmatch(name)))
