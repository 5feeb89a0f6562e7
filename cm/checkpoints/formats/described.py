"""safetensors files with a description of the network in their metadata.

The metadata have one additional entry: a JSON object under `KEY`, see `Description`. Any program that reads safetensors
reads the weights.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from cm.checkpoints.formats import safetensor_files
from cm.data.class_names import ClassNames, checked
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io.budget import MANIFEST, parse_json
from cm.report.run_facts import RunFacts

KEY = "consistency_toolkit"
SUFFIX = ".safetensors"
FORMAT = 1
CRC32 = "tensors_crc32"                                             # how `known` flags name the checksum
OWN_CRC32 = "description_crc32"                                     # files of older versions have none


def own_checksum(content: Mapping[str, Any]) -> int:
    """CRC-32 of the parts of a description about the network and its run; the weights have a checksum of their own."""
    said = [content.get(name) for name in ("config", "class_names", "run")]
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


@dataclass(frozen=True)
class Description:
    """A description of weights.

    :param config: the flags of the network, and those of its training that matter for using it.
    :param class_names: names of the classes; empty without classes.
    :param facts: facts about the training.
    :param crc32: CRC-32 of the tensors, see `safetensor_files.checksum`; None if it is not known.
    """

    config: Mapping[str, Any]
    class_names: ClassNames = ()
    facts: RunFacts = field(default_factory=RunFacts)
    crc32: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The description as JSON; `from_json` reads it back."""
        content = {"format": FORMAT, "config": dict(self.config), "class_names": list(self.class_names),
                   "run": self.facts.as_json(), "crc32": self.crc32}
        return content | {OWN_CRC32: own_checksum(content)}

    @classmethod
    def from_json(cls, content: Any, source: str, verify: bool = True) -> Description:
        """A description from an untrusted file; its flags are checked where they are used.

        :param verify: compare it with its own checksum, if it has one.
        :raises UserError: if it is not a valid description.
        """
        try:
            if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
                raise ValueError("it has no flags (config)")
            if content.get("format") != FORMAT:
                raise ValueError(f"its format is {str(content.get('format'))[:20]}, and this version reads {FORMAT}")
            if verify and own_checksum(content) != content.get(OWN_CRC32, own_checksum(content)):
                raise ValueError(f"it does not match its own checksum, so it is damaged or was edited (if you have "
                                 f"edited it, remove its {OWN_CRC32})")
            crc32 = content.get("crc32")
            if not (crc32 is None or type(crc32) is int):
                raise ValueError("its crc32 is no whole number")
            return cls(content["config"], checked(content.get("class_names", ())),
                       RunFacts.from_json(content.get("run", {})), crc32)
        except ValueError as error:
            raise UserError(f"{source} contains no valid description of a network: {error}. Download or write it "
                            "again") from None


def claims(path: str) -> bool:
    """Whether a file has this format. Call it on one rank."""
    if not path.lower().endswith(SUFFIX):
        return False
    try:
        return KEY in safetensor_files.metadata(path)
    except (OSError, ValueError):                                   # reading it as any safetensors file says why
        return False


def description(path: str) -> Description | None:
    """The description in a safetensors file; None without one. Call it on one rank.

    :raises UserError: if the file cannot be read, or its description is not valid.
    """
    try:
        text = safetensor_files.metadata(path).get(KEY)
        content = None if text is None else parse_json(text, MANIFEST)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file: {error}. Download or write it again") from None
    return None if text is None else Description.from_json(content, path)


def write(path: str, weights: Mapping[str, Tensor], about: Description) -> Description:
    """Write weights with their description; returns the description with the checksum of the weights.

    :raises UserError: if the file cannot be written.
    """
    about = replace(about, crc32=safetensor_files.checksum(weights))
    safetensor_files.write(path, weights, {KEY: json.dumps(about.as_json())})
    return about


def read(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the flags of the network, and its weights, on every rank.

    :raises UserError: if the file is damaged, or has no valid description.
    """
    about = dist.on_main(description, path)
    if about is None:
        raise UserError(f"{path} does not say what network it is for (no {KEY} in its metadata)")
    return known_flags(about), safetensor_files.read(path)


def known_flags(about: Description) -> dict[str, Any]:
    """A description as `cm.setup.inherit` takes it: flags, the names of classes, the checksum."""
    known: dict[str, Any] = dict(about.config)
    known.pop("class_names", None)
    return known | {"class_names": about.class_names, CRC32: about.crc32}
