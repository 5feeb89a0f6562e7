"""The presets that come with the toolkit: `--config digits/edm` is configs/digits/edm.yaml, installed or not."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """The folder of the presets: inside an installed package, or next to it in the repository."""
    installed = PACKAGE / "presets"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
    """Every preset, such as "digits/edm"."""
    return sorted(str(path.relative_to(folder()).with_suffix("")) for path in folder().glob("*/*.yaml"))


def find(path: str) -> str:
    """The file that --config names: itself where it exists, else the preset of that name, else what was asked for."""
    name = path.removesuffix(".yaml").removeprefix("configs/")
    if not os.path.exists(path) and name in names():
        return str(folder() / f"{name}.yaml")
    return path


def suggestion(path: str) -> str:
    """What to say of a file that does not exist; "" if no preset has a similar name."""
    near = get_close_matches(path.removesuffix(".yaml").removeprefix("configs/"), names(), n=1)
    return f"; did you mean the preset {near[0]}?" if near else ""
