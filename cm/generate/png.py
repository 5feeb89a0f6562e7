"""A folder with one PNG for each seed; running an interrupted command again completes it.

Names are those of NVlabs/edm: 000003.png or, with a folder for each 1000 seeds, 000000/000003.png. sampling.json, next
to them, says how the images were made: a folder never holds images of two kinds. dataset.json lists their classes.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cm.data.class_names import CLASS_NAMES, ClassNames
from cm.data.labels import LABEL_FILE
from cm.errors import UserError
from cm.generate.grids import save_picture, to_picture
from cm.io import atomic, budget, storage, untrusted

RECIPE = "sampling.json"
PER_FOLDER = 1000
LARGEST_SEED = np.iinfo(np.int64).max
PNG_START = b"\x89PNG\r\n\x1a\n"
CHUNK_FRAME = 12                                # bytes of a chunk besides its content: length, name, checksum
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
ENCODERS = 2                                    # threads; zlib releases Python's lock
WAITING = 256                                   # images that may wait for an encoder


class PngFolder:
    """Where the images of seeds are.

    :param subdirs: a folder for each 1000 seeds.
    """

    def __init__(self, outdir: str, subdirs: bool):
        self.outdir, self.subdirs = Path(outdir), subdirs

    def path(self, seed: int) -> Path:
        """The file of a seed."""
        folder = self.outdir / f"{seed - seed % PER_FOLDER:06d}" if self.subdirs else self.outdir
        return folder / f"{seed:06d}.png"

    def claim(self, recipe: Mapping[str, Any]) -> None:
        """Make the folder, or check that what it contains was made in the same way; for one process.

        :param recipe: all that the images depend on, as JSON can hold it.
        :raises UserError: naming what differs, or if there are images without a recipe, a folder of seeds is a link, or
            it cannot be written.
        """
        wanted, path = json.loads(json.dumps(dict(recipe))), self.outdir / RECIPE
        try:
            self.outdir.mkdir(parents=True, exist_ok=True)
            if self.subdirs and (link := next(filter(Path.is_symlink, self.outdir.glob("[0-9]*")), None)):
                raise UserError(f"{link} is a symbolic link, and images would be written where it leads: remove it, or "
                                "choose another --outdir")
            inside = [entry for entry in self.outdir.iterdir() if entry.is_dir() and not entry.is_symlink()]
            for folder in (self.outdir, *inside):
                atomic.remove_old_temporaries(folder)
            if path.exists():
                return self.compare(_read_recipe(path), wanted)
            if stranger := next(self.outdir.rglob("*.png"), None):
                raise UserError(f"--outdir {self.outdir} holds images, such as {stranger}, and no {RECIPE} that says "
                                "how they were made: choose another --outdir")
            storage.write_json(path, wanted)
        except OSError as error:
            raise UserError(f"--outdir {self.outdir}: {atomic.write_failure(path, error)}") from None

    def compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """:raises UserError: naming the first value in which two recipes differ."""
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                word, before = name[:100], untrusted.shown(found.get(name))
                raise UserError(
                    f"--outdir {self.outdir} holds images made with {word}={before}, and this run has "
                    f"{word}={wanted.get(name)!r}: choose another --outdir, or the same model and flags to resume"
                )

    def missing(self, seeds: Iterable[int]) -> list[int]:
        """The seeds, in their order, without an image or with a damaged one."""
        return [seed for seed in seeds if not _is_complete(self.path(seed))]

    def write_labels(self, label_of: Callable[[np.ndarray], np.ndarray | None], class_names: ClassNames) -> None:
        """List the classes of all images that are there in a dataset.json, as in a data set of EDM; for one process.

        :param label_of: from seeds [n] to classes [n]; None where there are no classes, and then nothing is written.
        :raises UserError: if it cannot be written.
        """
        stems = (path.stem for path in self.outdir.rglob("*.png"))
        numbers = sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())
        seeds = [seed for seed in numbers if seed <= LARGEST_SEED and self.path(seed).exists()]
        labels = label_of(np.array(seeds, np.int64))
        if labels is not None:
            names = [self.path(seed).relative_to(self.outdir).as_posix() for seed in seeds]
            known = {CLASS_NAMES: list(class_names)} if class_names else {}
            content = {"labels": [list(pair) for pair in zip(names, labels.tolist())]} | known
            storage.write_bytes(self.outdir / LABEL_FILE, json.dumps(content).encode())

    def read(self, seeds: Iterable[int]) -> np.ndarray:
        """The images of those seeds that have one: uint8 [n,H,W,C].

        :raises UserError: if one is no picture of the size and channels of the others, whoever put it there.
        """
        paths = [path for path in map(self.path, seeds) if _is_complete(path)]
        images = [_read_png(path) for path in paths]
        shapes = Counter(image.shape for image in images)
        for path, image in zip(paths, images):
            if image.shape != (usual := max(shapes, key=shapes.__getitem__)):
                raise UserError(f"{path} has shape {image.shape}, and the images next to it {usual}: remove it, and "
                                "the same command draws it again")
        return np.stack(images)


class PngWriter:
    """Encodes and writes images in threads, while others are drawn.

        with PngWriter(folder) as writer:
            writer.put(seeds, images)

    Files appear complete or not at all. Leaving the block waits for all of them.
    """

    def __init__(self, folder: PngFolder):
        self.folder = folder
        self._pool = ThreadPoolExecutor(ENCODERS)
        self._waiting: deque[Future] = deque()

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        while kind is None and self._waiting:
            self._waiting.popleft().result()

    def put(self, seeds: Sequence[int], images: np.ndarray) -> None:
        """Images [n,H,W,C] uint8 of these seeds.

        :raises UserError: if this or an earlier one cannot be written.
        """
        for seed, image in zip(seeds, images):
            self._waiting.append(self._pool.submit(_write_png, self.folder.path(seed), image))
        while self._waiting and (len(self._waiting) > WAITING or self._waiting[0].done()):
            self._waiting.popleft().result()


def _read_recipe(path: Path) -> Mapping[str, Any]:
    """:raises UserError: if the file holds no recipe."""
    try:
        recipe = budget.read_json(path, budget.SETTINGS)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}), so it is not known how the images next to it were made: "
                        "choose another --outdir") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is damaged (it holds a {type(recipe).__name__}, not an object), so it is not known "
                        "how the images next to it were made: choose another --outdir")
    return recipe


def _write_png(path: Path, image: np.ndarray) -> None:
    """Write an image, [H,W,C] uint8.

    :raises UserError: if it cannot be written, or is no picture.
    """
    storage.make_folder(path.parent)
    save_picture(path, to_picture(image), durable=False)       # a file that a power cut damages is drawn again


def _read_png(path: Path) -> np.ndarray:
    """[H,W,C] uint8.

    :raises UserError: if the pixels in a file with good checksums are none.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and the same command draws it again") from None
    return pixels.reshape(*pixels.shape[:2], -1)


def _is_complete(path: Path) -> bool:
    """Whether there is a PNG all of whose chunks match their checksums: a power cut may leave a file without its
    content, and a disk may change a part of it.

    :raises UserError: if something other than a file is there.
    """
    try:
        data = budget.read_bytes(path, budget.PICTURE)
    except UserError:
        raise
    except (OSError, ValueError):                                   # no file, or one that is too large
        return False
    place, end = len(PNG_START), len(data)
    while place + CHUNK_FRAME <= end:
        size = int.from_bytes(data[place : place + 4], "big")
        stop = place + CHUNK_FRAME + size
        if stop > end or zlib.crc32(data[place + 4 : stop - 4]) != int.from_bytes(data[stop - 4 : stop], "big"):
            return False
        place = stop
    return place == end and data.startswith(PNG_START) and data.endswith(PNG_END)
