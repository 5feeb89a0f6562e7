"""A cache of statistics, keyed by the content of the images and the identity of the network."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from cm.errors import UserError
from cm.io.downloads import sha256
from cm.logging import logger
from evaluations.defaults import NO_CACHE, cache_folder
from evaluations.engine.npz_writer import add_arrays, write_npz
from evaluations.engine.readers import BatchFile, Statistics

KEPT = 40                                                   # entries; 34 MB each in Inception's features
HASH_DIGITS = 24
OWN_NAME = re.compile(rf"[0-9a-f]{{{HASH_DIGITS}}}-.+\.npz", re.DOTALL)     # a user may keep other files there


class StatisticsCache:
    """A folder of npz files as `fid.py ref` writes them, each for one set of images, network and kind of features.

    The entries used last stay, `KEPT` of them. What cannot be read is computed again, and a folder that cannot be
    written to is no more than a warning.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._hashes: dict[str, str] = {}

    def load(
        self, images: str, extractor_id: str, kind_suffix: str = "", choice: str = "", resize: str | None = None
    ) -> Statistics | None:
        """What is known of the images at a path.

        :param choice: which of the images, where not all are meant.
        :param resize: the extractor's rule; what was computed by another one is not returned.
        """
        path = self._place(images, extractor_id, kind_suffix, choice)
        if not path.exists():
            return None
        try:
            found = BatchFile(path).statistics()
            os.utime(path)
            same = found is not None and found.extractor == extractor_id and resize in (None, found.resize)
            return found if same else None
        except (UserError, OSError) as error:
            logger.warn(f"a file of the statistics cache is not used: {error}")
            return None

    def save(self, images: str, statistics: Statistics, kind_suffix: str = "", choice: str = "") -> None:
        """Keep the statistics of the images at a path."""
        path = self._place(images, str(statistics.extractor), kind_suffix, choice)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_npz(str(path), lambda archive: add_arrays(archive, statistics.arrays()))
            self._forget_the_oldest()
        except (UserError, OSError) as error:
            logger.warn(f"the statistics are not kept in the cache: {error}")

    def _place(self, images: str, extractor_id: str, kind_suffix: str, choice: str) -> Path:
        if images not in self._hashes:
            self._hashes[images] = content_hash(images)
        return self.folder / f"{self._hashes[images]}{choice and f'-{choice}'}-{extractor_id}{kind_suffix}.npz"

    def _forget_the_oldest(self) -> None:
        own = [path for path in self.folder.glob("*.npz") if OWN_NAME.fullmatch(path.name)]
        entries = sorted(own, key=lambda path: path.stat().st_mtime)
        for path in entries[:-KEPT]:
            with contextlib.suppress(OSError):              # another process may have been quicker
                path.unlink()


def content_hash(path: str) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    if not os.path.isdir(path):
        return sha256(path)[:HASH_DIGITS]
    digest = hashlib.sha256()
    for file in sorted(each for each in Path(path).rglob("*") if each.is_file()):
        digest.update(f"{file.relative_to(path)}\0{sha256(file)}\0".encode())
    return digest.hexdigest()[:HASH_DIGITS]


def open_cache(folder: str | None) -> StatisticsCache | None:
    """The cache in a folder, by default in the user's cache; None for "off"."""
    if folder == NO_CACHE:
        return None
    return StatisticsCache(folder or cache_folder())
