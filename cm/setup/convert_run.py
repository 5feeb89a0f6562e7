"""Convert a complete checkpoint of a run between its two formats: files, or folders to which every rank writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cm.checkpoints import dcp, file_names, manifest
from cm.checkpoints.dcp import Piece
from cm.checkpoints.share_writer import prepare, write_shares
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage
from cm.training import pieces, state

FORMATS = ("files", "dcp")


def convert_run(source: str, dest: str, format: str, verify: bool = True) -> manifest.Checkpoint:
    """Write a complete checkpoint in the other format; for one process.

    :param source: its manifest, one of its files, or its folder, which means the newest checkpoint there.
    :param dest: a folder.
    :raises UserError: if it cannot be read or written, or there already is a checkpoint of its step.
    """
    if dist.get_world_size() > 1:
        raise UserError("a checkpoint is converted by one process; start it without mpiexec")
    found = manifest.find(source, verify)
    if storage.exists(storage.join(dest, file_names.manifest_name(found.step))):
        raise UserError(f"--dest {dest} already holds a checkpoint of step {found.step}: choose another folder")
    content = {name: read_part(found, name, verify) for name in found.names() if name != "trainer"}
    trainer = state.load_part("trainer", found, verify)
    groups = trainer.pop(state.GROUPS, None)
    if format == "files":
        for name in groups or ():
            content[name]["param_groups"] = groups[name]
        return _save(found, dest, {**content, "trainer": trainer}, {})
    optimizers = [name for name, part in content.items() if "param_groups" in part]
    trainer[state.GROUPS] = {name: content[name]["param_groups"] for name in optimizers}
    parts = {name: pieces_of(part) for name, part in content.items()}
    prepare(dest, found.step, list(parts), sum(p.rows.nbytes for each in parts.values() for p in each.values()))
    shares = write_shares(dest, found.step, parts, 0)
    folders = {name: file_names.file_name(name, found.step, dcp.SUFFIX) for name in parts}
    written = {folder: dcp.complete(storage.join(dest, folder), [shares[name]]) for name, folder in folders.items()}
    return _save(found, dest, {"trainer": trainer}, written)


def read_part(found: manifest.Checkpoint, name: str, verify: bool) -> dict[str, Any]:
    """The state dict of a part, from either format; for an optimizer from a folder, without its param_groups."""
    part = state.load_part(name, found, verify)
    if not (found.path(name) or "").endswith(dcp.SUFFIX):
        return part
    if name.split("_")[0] != "opt":
        return dict(dcp.whole(part))
    saved = pieces.optimizer_state(part, [])["state"]
    return {"state": {place: {key: value[...] for key, value in entry.items()} for place, entry in saved.items()}}


def pieces_of(part: dict[str, Any]) -> dict[str, Piece]:
    """All of a state dict."""
    if "param_groups" not in part:
        return {name: Piece(value, value.shape) for name, value in part.items()}
    return {
        f"{pieces.STATE}.{place}.{name}": Piece(value, value.shape)
        for place, entry in part["state"].items() for name, value in entry.items()
    }


def _save(found: manifest.Checkpoint, dest: str, content: dict[str, Any], written: dict) -> manifest.Checkpoint:
    return manifest.write(replace(found, directory=dest, files={}, origin=""), content, written)
