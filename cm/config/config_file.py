"""The files of --config: flat mappings of flags in YAML or JSON. Nothing in them is ever executed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cm.config import presets
from cm.config.flat_file import parse_flat
from cm.errors import UserError, did_you_mean
from cm.io.budget import SETTINGS, read_bytes
from cm.io.untrusted import shown


def by_own_name(given: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by the flags' own names, where `given` may use their aliases.

    :raises UserError: if two names of one flag are given with different values.
    """
    own = {alias: name for name, field in fields.items() for alias in field.metadata["aliases"]}
    found: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for word, value in given.items():
        name = own.get(word, word)
        if name in found and found[name] != value:
            raise UserError(f"{where}--{spelt[name]} and --{word} are names of one flag, but have the values "
                            f"{found[name]!r} and {value!r}; drop one of them")
        found[name], spelt[name] = value, word
    return found


def read_config(path: str, fields: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a flat mapping of flags from YAML or JSON; nothing in it is ever executed.

    The key `base` names another file, relative to this one, for what is not set here.

    :param path: a file, or the name of a preset such as digits/edm.
    """
    path = presets.find(path)
    try:
        content = parse_flat(read_bytes(path, SETTINGS))
    except UserError as error:
        raise UserError(f"--config {error}") from None
    except FileNotFoundError as error:
        raise UserError(f"--config {path}: {error.strerror}{presets.suggestion(path)}") from None
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--config {path} is neither YAML nor JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold `flag: value` lines, not a {type(content).__name__}")
    base = content.pop("base", "")
    content = by_own_name(content, fields, f"--config {path}: ")
    for name in content:
        if name not in fields:
            raise UserError(f"--config {path}: {shown(name)} is not a flag of this script.{did_you_mean(name, fields)} "
                            "A flag of a plugin needs its --plugin FILE.")
    if not base:
        return content
    base = os.path.normpath(os.path.join(os.path.dirname(path), str(base)))
    if base in above:
        raise UserError(f"--config {path}: its base {base} is in turn based on this file")
    return read_config(base, fields, (*above, base)) | content
