"""Folders in the layout of model hubs: model.safetensors, config.json, a model card, and perhaps a picture of samples.

The weights describe themselves (`described`). config.json repeats this description for people and for the hub's
programs; it is used where another program has rewritten the weights without their metadata.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cm.checkpoints import file_names
from cm.checkpoints.formats import described, safetensor_files
from cm.checkpoints.formats.described import Description
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage
from cm.io.budget import MANIFEST, read_bytes, read_json
from cm.logging import logger

WEIGHTS, CONFIG, CARD, PICTURE_FILE = "model.safetensors", "config.json", "README.md", "samples.png"
LIBRARY = "consistency-toolkit"                                     # config.json's library_name
CARD_CRC32 = "card_crc32"                                           # of the card as it was written


def is_folder(path: str) -> bool:
    """Whether a path is such a folder; for one rank."""
    return os.path.isdir(path) and os.path.exists(os.path.join(path, WEIGHTS)) and bool(_config_of(path))


def _config_of(folder: str) -> dict[str, Any]:
    """What config.json says, if it was written by this toolkit; empty otherwise."""
    try:
        content = read_json(os.path.join(folder, CONFIG), MANIFEST)
    except (OSError, ValueError, UserError):
        return {}
    return content if isinstance(content, dict) and content.get("library_name") == LIBRARY else {}


def description(folder: str) -> Description:
    """What a folder says of its network; for one rank.

    :raises UserError: if it says nothing that can be used, or its two files say different things.
    """
    weights, config = os.path.join(folder, WEIGHTS), os.path.join(folder, CONFIG)
    about = described.description(weights)
    said = Description.from_json(_config_of(folder), config, verify=about is None)
    if about is None:                                               # written anew: the values need not be the same
        return Description(said.config, said.class_names, said.facts)
    for name in {*about.config, *said.config}:
        if about.config.get(name) != said.config.get(name):
            raise UserError(f"{config} and the metadata of {weights} differ in {name[:100]!r}: one of them was edited, "
                            "or belongs to another model. Download the folder again, or load the file of weights alone")
    return about


def read(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The flags of the network, and its weights, on every rank.

    :raises UserError: as `description`, and if the weights are damaged.
    """
    about = dist.on_main(description, folder)
    return described.known_flags(about), safetensor_files.read(os.path.join(folder, WEIGHTS))


def write(folder: str, weights: Mapping[str, Tensor], about: Description, card: str, picture: bytes = b"") -> None:
    """Write a folder; on one rank.

    A card that was edited since it was written stays.

    :param card: README.md.
    :param picture: a PNG.
    :raises UserError: if the folder is not free for it, or cannot be written.
    """
    check_free(folder)
    before = _config_of(folder) if os.path.isdir(folder) else {}
    storage.make_folder(folder)
    about = described.write(os.path.join(folder, WEIGHTS), weights, about)
    if picture:
        storage.write_bytes(os.path.join(folder, PICTURE_FILE), picture)
    crc32 = zlib.crc32(card.encode())
    if _is_edited(folder, before):
        logger.log(f"{os.path.join(folder, CARD)} was edited since it was written, so it is kept")
        crc32 = before[CARD_CRC32]
    else:
        storage.write_bytes(os.path.join(folder, CARD), card.encode())
    content = {"library_name": LIBRARY, **about.as_json(), CARD_CRC32: crc32}
    storage.write_json(os.path.join(folder, CONFIG), content)       # last: without it there is no such folder


def check_free(folder: str) -> None:
    """Refuse a folder that holds something else; for one rank.

    :raises UserError: if it holds checkpoints of a run, or files of these names that this module has not written.
    """
    if storage.is_remote(folder):
        raise UserError(f"{folder}: a model folder can only be written to a local path; copy it from there")
    if not os.path.isdir(folder):
        return
    taken = [name for name in (WEIGHTS, CONFIG, CARD) if os.path.exists(os.path.join(folder, name))]
    if file_names.steps(folder):
        raise UserError(f"{folder} contains checkpoints of a run: choose another folder")
    if taken and not _config_of(folder):
        raise UserError(f"{folder} contains another {taken[0]}, which would be overwritten: choose another folder")


def _is_edited(folder: str, before: Mapping[str, Any]) -> bool:
    """Whether the card there is another one than `write` has left."""
    path = os.path.join(folder, CARD)
    if not before or not os.path.exists(path):
        return False
    try:
        return zlib.crc32(read_bytes(path, MANIFEST)) != before.get(CARD_CRC32)
    except ValueError:                                              # larger than any card from here
        return True
