"""The checkpoints of a run: what they contain, writing, reading, and finding them.

A checkpoint consists of the files of one step, with the names of guided-diffusion (model000010.pt,
ema_0.9999_000010.pt, opt000010.pt, target_model000010.pt), and a manifest, checkpoint_000010.json, which is written
last. The manifest lists the files with size and checksum, and contains the resolved flags of the run, from which
samplers learn the architecture. If the manifest of a step is missing or does not match the files, the step is not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from cm.checkpoints import dcp, serialization
from cm.checkpoints.file_names import MANIFEST, file_name, manifest_name, parse_name, steps
from cm.checkpoints.leftovers import give_up
from cm.data import class_names
from cm.data.class_names import ClassNames
from cm.errors import UserError
from cm.io import budget, storage, untrusted
from cm.io.atomic import PARTIAL
from cm.logging import logger

FORMAT = 2                                      # format 1 has no checksum of its own, and is still read
CHECKSUM = "manifest_crc32"                     # key of the checksum of everything else in the manifest


@dataclass(frozen=True)
class Checkpoint:
    """One complete step of a run."""

    directory: str
    step: int
    images_seen: int
    config: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> {"size": bytes, "crc32": checksum}; see `dcp.facts_of`. None before they are written."""
    seconds: float = 0.0                        # of training so far, over all starts of the run
    origin: str = ""                            # the --resume PATH from which the run started; empty: none
    class_names: ClassNames = ()                # names of the classes by number; empty if they are not known
    initial_weight: dict[str, float] = field(default_factory=dict)
    """Average ("ema_0.9999") -> the fraction of the initial weights that it still contains."""
    run: str = ""                               # identifier of the run that saved it; empty in older manifests

    @property
    def manifest(self) -> str:
        """The path of its manifest."""
        return storage.join(self.directory, manifest_name(self.step))

    def write_manifest(self) -> None:
        """Write the manifest, which makes the checkpoint exist.

        :raises UserError: if it cannot be written.
        """
        content = {"format": FORMAT, **asdict(self)}
        del content["directory"]                # a checkpoint may be moved
        content[CHECKSUM] = checksum(content)
        storage.write_json(self.manifest, content)

    def path(self, name: str) -> str | None:
        """The path of the file, or folder, of `name` ('model', 'opt', 'ema_0.9999'); None if there is none."""
        files = [file for suffix in (".pt", dcp.SUFFIX) if (file := file_name(name, self.step, suffix)) in self.files]
        return storage.join(self.directory, files[0]) if files else None

    def names(self) -> list[str]:
        """The names of its parts: 'model', 'ema_0.9999', 'opt', ..."""
        return [parsed[0] for file in self.files if (parsed := parse_name(file))]

    def can_resume(self) -> bool:
        """Whether training can resume from it. An old milestone contains only the averages."""
        return "model" in self.names()

    def facts(self, path: str) -> dict[str, Any] | None:
        """Size and CRC-32 of a file of the checkpoint; None for a file that the manifest does not list."""
        return self.files.get(os.path.basename(path))

    def problem(self, verify: bool = True) -> str | None:
        """What is wrong with the files, or None.

        :param verify: also compare checksums, which reads all files.
        """
        problems = (self.problem_of(file, verify) for file in self.files)
        return next((problem for problem in problems if problem), None)

    def problem_of(self, file: str, verify: bool = True) -> str | None:
        """What is wrong with one of the files, or folders, or None.

        :param verify: also compare its checksum, which reads the file.
        """
        path, expected = storage.join(self.directory, file), self.files[file]
        if "files" in expected:
            return dcp.problem(path, expected, verify)
        if not storage.exists(path):
            return f"{file} is missing"
        damaged = storage.checksum(path) != expected if verify else storage.size(path) != expected["size"]
        if damaged:
            return f"{file} is truncated or damaged (size or checksum differ from the manifest)"
        return None


def save(
    directory: str, step: int, content: Mapping[str, Any], config: Mapping[str, Any], images_seen: int,
    seconds: float = 0.0, classes: ClassNames = (), initial_weight: Mapping[str, float] | None = None,
) -> Checkpoint:
    """Write a checkpoint that does not belong to a training run; call it on one rank.

    :param classes: names of the network's classes; empty without classes.
    :param seconds, initial_weight: see `Checkpoint`.
    """
    checkpoint = Checkpoint(
        directory, step, images_seen, dict(config), seconds=seconds, class_names=classes,
        initial_weight=dict(initial_weight or {}),
    )
    return write(checkpoint, content)


def write(
    checkpoint: Checkpoint, content: Mapping[str, Any], written: Mapping[str, dict[str, Any]] | None = None
) -> Checkpoint:
    """Write the files of a checkpoint, then its manifest; call it on one rank.

    :param checkpoint: without files.
    :param content: name ('model', 'ema_0.9999', 'opt', ...) -> content of its file, for `torch.save`.
    :param written: folders that the ranks have already written -> their sizes and checksums.
    :returns: the checkpoint with its files.
    :raises UserError: if it cannot be written; earlier checkpoints are unchanged, and nothing of this one is left.
    """
    directory, step = checkpoint.directory, checkpoint.step
    needed, files = serialization.size_of(content), dict(written or {})
    try:
        _begin(directory, step, needed)
        for name, tensors in content.items():
            file = file_name(name, step)
            files[file] = {}
            files[file] = serialization.save_tensors(storage.join(directory, file), tensors)
        names = class_names.worth_keeping(checkpoint.class_names)
        saved = replace(checkpoint, files=files, class_names=names)
        saved.write_manifest()
        if not storage.is_remote(directory):
            with contextlib.suppress(OSError):              # the checkpoint is complete even if this fails
                storage.remove(storage.join(directory, manifest_name(step) + PARTIAL))
    except (UserError, OSError) as error:
        give_up(directory, step, files)
        raise save_failure(directory, step, needed, error) from error
    return saved


def begin(directory: str, step: int, needed: int) -> None:
    """Make the folder, and check that there is space for `needed` bytes; call it on one rank, before several write.

    :raises UserError: if there is not enough space, or the folder cannot be made.
    """
    try:
        _begin(directory, step, needed)
    except (UserError, OSError) as error:
        raise save_failure(directory, step, needed, error) from error


def _begin(directory: str, step: int, needed: int) -> None:
    storage.make_folder(directory)
    free = storage.free_bytes(directory)
    if free is not None and free < needed:
        raise UserError(f"there is not enough space in {directory}")
    if not storage.is_remote(directory):        # if this process is killed now, `remove_partial` finds the files
        storage.write_bytes(storage.join(directory, manifest_name(step) + PARTIAL), b"")


def save_failure(directory: str, step: int, needed: int, error: Exception) -> UserError:
    """The error for a checkpoint that cannot be written."""
    free = storage.free_bytes(directory)
    space = "" if free is None else f", and {free:,} bytes are free there"
    return UserError(
        f"{error}. The checkpoint of step {step} needs {needed:,} bytes in {directory}{space}; earlier checkpoints "
        "are unchanged. --keep_checkpoints keeps fewer of them, --checkpoint_dir chooses another folder"
    )


def add(checkpoint: Checkpoint, name: str, tensors: Any) -> Checkpoint:
    """Add a file to a checkpoint, or replace it, and list it in the manifest; call it on one rank.

    :param checkpoint: may have no files yet.
    :raises UserError: if it cannot be written.
    """
    file = file_name(name, checkpoint.step)
    storage.make_folder(checkpoint.directory)
    facts = serialization.save_tensors(storage.join(checkpoint.directory, file), tensors)
    added = replace(checkpoint, files=checkpoint.files | {file: facts})
    added.write_manifest()
    return added


def read(path: str) -> Checkpoint:
    """Read a manifest.

    :raises UserError: if it is not a manifest, is damaged, or its object store cannot be reached.
    """
    try:
        with storage.open_file(path) as file:
            content = budget.parse_json(budget.read_file(file, budget.MANIFEST.bytes), budget.MANIFEST)
        _check_files(content["files"])
        checkpoint = Checkpoint(
            os.path.dirname(path), int(content["step"]), int(content["images_seen"]), dict(content["config"]),
            dict(content["files"]), float(content.get("seconds", 0.0)), str(content.get("origin", "")),
            class_names.checked(content.get("class_names", ())),
            {name: float(share) for name, share in dict(content.get("initial_weight", {})).items()},
            str(content.get("run", "")),
        )
        _check_whole(content, checkpoint.step, path)
        return checkpoint
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not a manifest of a checkpoint: {type(error).__name__}: {error}") from None


def checksum(content: Mapping[str, Any]) -> int:
    """CRC-32 of the values in a manifest, without its own checksum. White space and the order of keys do not matter."""
    plain = json.loads(json.dumps({name: value for name, value in content.items() if name != CHECKSUM}))
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def _check_whole(content: dict[str, Any], step: int, path: str) -> None:
    """Compare a manifest with its own checksum, and its step with its name.

    :raises UserError: if they differ.
    """
    remedy = ("restore it from a copy or take another checkpoint; to use the weights all the same, move them to a "
              "folder without it and give the flags of their network")
    if CHECKSUM in content or content.get("format", 1) != 1:
        if content.get(CHECKSUM) != checksum(content):
            raise UserError(f"{path} is damaged or was edited: it does not match its own checksum; {remedy}")
    else:
        _say_unprotected(path)
    named = MANIFEST.fullmatch(os.path.basename(path))
    if named and int(named[1]) != step:
        raise UserError(f"{path} is a manifest of step {step}, but its name says {int(named[1])}; "
                        f"{remedy}")


@cache
def _say_unprotected(path: str) -> None:
    logger.log(f"{path} was written by an older version, without its own checksum: damage to it cannot be detected")


def _check_files(files: dict[str, dict[str, Any]]) -> None:
    """:raises ValueError: unless each entry is a file in the same folder with size and checksum, or a folder of such
        files.
    """
    for name, facts in files.items() if isinstance(files, dict) else [("files", None)]:
        if untrusted.escapes(name) or "/" in name or "\\" in name:
            raise ValueError(f"{untrusted.shown(name)} is not the name of a file next to it")
        if not isinstance(facts, dict) or [type(facts.get(key)) for key in ("size", "crc32")] != [int, int]:
            raise ValueError(f"{untrusted.shown(name)} has no size and checksum")
        if "files" in facts:
            within = facts["files"]
            _check_files(within)
            names = all(dcp.FILE.fullmatch(each) and "files" not in within[each] for each in within)
            if not names or not name.endswith(dcp.SUFFIX):
                raise ValueError(f"{untrusted.shown(name)} holds files of other names")


def newest(directory: str, verify: bool = True) -> Checkpoint | None:
    """The newest complete checkpoint of a folder; None if there is none. Damaged ones are skipped with a warning.

    :param verify: see `Checkpoint.problem`.
    """
    for checkpoint in newest_first(directory):
        if not checkpoint.can_resume():
            continue
        problem = checkpoint.problem(verify)
        if problem is None:
            return checkpoint
        logger.warn(f"skipping {manifest_name(checkpoint.step)} in {directory}: {problem}")
    return None


def newest_first(directory: str) -> Iterator[Checkpoint]:
    """The checkpoints of a folder, the newest first; a manifest that cannot be read is skipped with a warning."""
    for step in reversed(steps(directory)):
        name = manifest_name(step)
        try:
            checkpoint = read(storage.join(directory, name))
        except UserError as error:
            logger.warn(f"skipping {name} in {directory}: {error}")
            continue
        yield checkpoint


def find(path: str, verify: bool = True) -> Checkpoint:
    """The checkpoint at a path: a manifest, a file of the checkpoint, or a folder, which means its newest checkpoint.

    :param verify: see `Checkpoint.problem`.
    :raises UserError: if there is none, or it is damaged.
    """
    if storage.is_directory(path) and not parse_name(path):
        checkpoint = newest(path, verify)
        if checkpoint is None:
            raise UserError(f"--resume {path}: this folder holds no complete checkpoint (checkpoint_*.json)")
        return checkpoint
    if not storage.exists(path):
        raise UserError(f"--resume {path}: no such file; give auto, never, a manifest, its folder or a model file")
    checkpoint = beside(path) if parse_name(path) else read(path)
    if checkpoint is None:
        raise UserError(
            f"--resume {path}: there is no manifest next to these weights, so the state of the run is not known; "
            "to start a new run from them, use --resume_checkpoint"
        )
    problem = checkpoint.problem(verify) if checkpoint.can_resume() else "only its averages were kept"
    if problem:
        raise UserError(f"--resume {path}: {problem}")
    return checkpoint


def beside(path: str) -> Checkpoint | None:
    """The checkpoint that a weights file belongs to, if its manifest is in the same folder."""
    parsed = parse_name(path)
    if parsed is None:
        return None
    manifest = storage.join(os.path.dirname(path), manifest_name(parsed[1]))
    return read(manifest) if storage.exists(manifest) else None
