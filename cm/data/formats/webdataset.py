"""Shards of a WebDataset: tar files in which the members of one sample, such as 7.jpg and 7.cls, follow each other.

The package webdataset reads the tar files and groups their members. Files are opened here: it would run a name that
begins with "pipe:" as a program.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cm.data.decode import IMAGE_BYTES, IMAGE_SUFFIXES
from cm.data.image_source import Format
from cm.data.labels import MAX_CLASSES
from cm.data.streams import Item
from cm.errors import UserError
from cm.io import storage, untrusted
from cm.io.budget import parse_json

BESIDE_SHARDS = (".json", ".txt", ".csv", ".idx")                   # what tools leave in a folder of shards
META = re.compile(r"__[^/]*__($|/)")                                # members that webdataset leaves out
LABEL_KEYS = ("label", "cls")                                       # of a .json member


class TarShards:
    """An `ImageStream` of tar files; a part is one of them.

    A sample's image is its first member with the suffix of an image. Its class is the number in its .cls member, or
    `label` or `cls` in its .json member.

    :param data_dir: a name with ranges in braces, such as `set/shards-{000..003}.tar`, or a folder of tar files.
    :raises UserError: if a shard is missing, or webdataset is not installed.
    """

    def __init__(self, data_dir: str):
        self.data_dir = data_dir
        webdataset()
        self.shards = _shards(data_dir)
        missing = [shard for shard in self.shards if not storage.exists(shard)]
        if missing or not self.shards:
            raise UserError(f"--data_dir {data_dir}: {missing[0] if missing else 'a shard'} does not exist; it stands "
                            f"for {len(self.shards)} shard(s), of which {len(missing)} are missing")

    @property
    def num_parts(self) -> int:
        """The number of shards."""
        return len(self.shards)

    def count(self, part: int) -> int:
        """How many samples of a shard have an image, by the names of its members.

        :raises UserError: if it is damaged.
        """
        shard = self.shards[part]
        with _naming_damage(shard) as place:
            samples = webdataset().tariterators.group_by_keys(_members(shard, place))
            return sum(_image_member(sample) is not None for sample in samples)

    def items(self, part: int) -> Iterator[Item]:
        """The images of a shard.

        :raises UserError: if it is damaged, or a class is no number.
        """
        self.count(part)                                            # finds what is wrong before anything is unpacked
        shard, reader = self.shards[part], webdataset().tariterators
        with _naming_damage(shard) as place, storage.open_file(shard) as file:
            files = reader.tar_file_expander([{"url": shard, "stream": file}])
            for sample in reader.group_by_keys(files):
                place.last = f"member {sample['__key__']!r}"
                suffix = _image_member(sample)
                if suffix is not None:
                    name = f"{shard}: member '{sample['__key__']}.{suffix}'"
                    yield Item(name, sample[suffix], _label(sample, shard))


@dataclass
class _Place:
    """How far a shard was read."""

    last: str = "its beginning"


@contextmanager
def _naming_damage(shard: str) -> Iterator[_Place]:
    """Turn what a reader of tar files raises into a message with the shard and the place."""
    place = _Place()
    try:
        yield place
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = error.args[0] if error.args else error             # webdataset adds more
        raise UserError(f"{shard} is damaged after {place.last}: {reason}; replace it") from None


def _members(shard: str, place: _Place) -> Iterator[dict[str, Any]]:
    """The names of the members, as webdataset takes them, by the headers alone.

    :raises UserError: for a member that is too large.
    :raises TarError: for a damaged file.
    """
    with storage.open_file(shard, random_access=True) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            place.last = f"member {untrusted.shown(member.name)}"
            if member.size > IMAGE_BYTES or member.issparse():
                raise UserError(f"{shard}: {place.last} has {member.size:,} bytes, more than an image may have, or is "
                                "sparse; remove it")
            if member.isreg() and not META.match(member.name):
                yield {"fname": member.name, "data": b"", "__url__": shard}
        file.seek(archive.offset)                                   # tarfile takes an unreadable header for the end
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("what follows is neither a member nor the end")


def webdataset() -> Any:
    """The package.

    :raises UserError: if it is not installed.
    """
    try:
        import webdataset as package
        import webdataset.tariterators
    except ImportError:
        raise UserError("shards of a WebDataset (.tar) need the package webdataset: pip install webdataset") from None
    return package


def _shards(data_dir: str) -> list[str]:
    """The names of the shards, in order."""
    if not data_dir.lower().endswith(".tar"):
        return [storage.join(data_dir, name) for name in sorted(storage.list_names(data_dir)) if name.endswith(".tar")]
    return webdataset().shardlists.expand_urls(data_dir)


def _image_member(sample: dict[str, Any]) -> str | None:
    """The suffix of the image among the members of a sample."""
    return next((suffix[1:] for suffix in IMAGE_SUFFIXES if suffix[1:] in sample), None)


def _label(sample: dict[str, Any], shard: str) -> int | None:
    """The class of a sample, None if it has none.

    :raises UserError: if it is no class number.
    """
    label, suffix = None, "cls"
    try:
        if "cls" in sample:
            label = int(sample["cls"])
        elif "json" in sample:
            suffix = "json"
            content = parse_json(sample["json"])
            label = next((content[key] for key in LABEL_KEYS if key in content), None)
        if label is None or type(label) is int and 0 <= label < MAX_CLASSES:
            return label
        reason = f"{untrusted.shown(label)} is no class number"
    except (ValueError, TypeError) as error:
        reason = str(error)
    raise UserError(f"{shard}: member '{sample['__key__']}.{suffix}' contains no class: {reason}; correct or remove it")


def _claims(data_dir: str) -> bool:
    """Whether a name is that of shards: it ends in .tar, or is a folder of such files and what belongs to them."""
    if data_dir.lower().endswith(".tar"):
        return True
    found = False
    for name in storage.each_name(data_dir) if storage.is_directory(data_dir) else ():
        if not name.startswith(".") and not name.endswith((".tar", *BESIDE_SHARDS)):
            return False                                            # mostly the first of many images
        found = found or name.endswith(".tar")
    return found


FORMAT = Format(_claims, TarShards, "shards of a WebDataset (.tar)", on_disk="no", is_stream=True)
