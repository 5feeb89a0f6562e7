"""A folder with one PNG for each seed, which a restarted run completes.

Names are those of NVlabs/edm: 000003.png or, with a folder for each 1000 seeds, 000000/000003.png. sampling.json, next
to them, says how the images were made: a folder never holds images of two kinds. dataset.json lists their classes.
"""

from __future__ import annotations

import json
import os
from collections import deque
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
from cm.io import atomic, storage

RECIPE = "sampling.json"
PER_FOLDER = 1000
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
        :raises UserError: naming what differs, or if there are images without a recipe, or it cannot be written.
        """
        wanted, path = json.loads(json.dumps(dict(recipe))), self.outdir / RECIPE
        try:
            self.outdir.mkdir(parents=True, exist_ok=True)
            for folder in (self.outdir, *(entry for entry in self.outdir.iterdir() if entry.is_dir())):
                atomic.remove_old_temporaries(folder)
            if path.exists():
                return self.compare(json.loads(path.read_text()), wanted)
            if stranger := next(self.outdir.rglob("*.png"), None):
                raise UserError(f"--outdir {self.outdir} holds images, such as {stranger}, and no {RECIPE} that says "
                                "how they were made: choose another --outdir")
            storage.write_json(path, wanted)
        except OSError as error:
            raise UserError(f"--outdir {self.outdir}: {atomic.write_failure(path, error)}") from None
        except json.JSONDecodeError:
            raise UserError(f"{path} is damaged, so it is not known how the images next to it were made: "
                            "choose another --outdir") from None

    def compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """:raises UserError: naming the first value in which two recipes differ."""
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                raise UserError(
                    f"--outdir {self.outdir} holds images made with {name}={found.get(name)!r}, and this run has "
                    f"{name}={wanted.get(name)!r}: choose another --outdir, or the same model and flags to resume"
                )

    def missing(self, seeds: Iterable[int]) -> list[int]:
        """Those of the seeds, in their order, that have no image yet, or a damaged one."""
        return [seed for seed in seeds if not _is_complete(self.path(seed))]

    def write_labels(self, label_of: Callable[[np.ndarray], np.ndarray | None], class_names: ClassNames) -> None:
        """List the classes of all images that are there in a dataset.json, as in a data set of EDM; for one process.

        :param label_of: from seeds [n] to classes [n]; None where there are no classes, and then nothing is written.
        :raises UserError: if it cannot be written.
        """
        stems = (path.stem for path in self.outdir.rglob("*.png"))
        seeds = [seed for seed in sorted(int(stem) for stem in stems if stem.isdigit()) if self.path(seed).exists()]
        labels = label_of(np.array(seeds, np.int64))
        if labels is not None:
            names = [self.path(seed).relative_to(self.outdir).as_posix() for seed in seeds]
            known = {CLASS_NAMES: list(class_names)} if class_names else {}
            content = {"labels": [list(pair) for pair in zip(names, labels.tolist())]} | known
            storage.write_bytes(self.outdir / LABEL_FILE, json.dumps(content).encode())

    def read(self, seeds: Iterable[int]) -> np.ndarray:
        """The images of those seeds that have one: uint8 [n,H,W,C]."""
        images = [np.asarray(Image.open(self.path(seed))) for seed in seeds if _is_complete(self.path(seed))]
        return np.stack([image.reshape(*image.shape[:2], -1) for image in images])


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


def _write_png(path: Path, image: np.ndarray) -> None:
    """Write an image, [H,W,C] uint8.

    :raises UserError: if it cannot be written, or is no picture.
    """
    storage.make_folder(path.parent)
    save_picture(path, to_picture(image), durable=False)       # a file that a power cut damages is drawn again


def _is_complete(path: Path) -> bool:
    """Whether there is a PNG with its last byte: after a power cut a file may exist without its content."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:                                                 # no file, or a shorter one
        return False
