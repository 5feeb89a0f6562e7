"""Sets of images as people have them."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("Aunt Mary", "the dog", "Zebra crossings")


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth picture in colour."""
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))


def mixed_folder(folder: Path, count: int = 60) -> Path:
    """Photos of mixed sizes in folders with spaces in their names, with endings in upper and lower case."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / CLASSES[i % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(40, 90, 2).tolist()
        photo(rng, width, height).save(place / f"IMG {i:03d}.{('JPG', 'jpg', 'PNG')[i % 3]}",
                                       format=("jpeg", "jpeg", "png")[i % 3])
    return folder


def cifar_zip(path: Path, count: int = 40) -> Path:
    """A zip of 32x32 PNGs with a dataset.json, as datasets/dataset_tool.py makes of CIFAR-10."""
    from cm.io.storage import write_json

    rng, labels = np.random.default_rng(0), []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            name, content = f"00000/img{i:08d}.png", io.BytesIO()
            photo(rng, 32, 32).save(content, "png")
            archive.writestr(name, content.getvalue())
            labels.append([name, i % 10])
        facts = path.with_suffix(".json")
        write_json(facts, {"labels": labels})
        archive.write(facts, "dataset.json")
    facts.unlink()
    return path


def grey_folder(folder: Path, as_rgb: bool, count: int = 12) -> Path:
    """Grey images of 28x28, as files in grey or in RGB."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        grey = Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8))
        (grey.convert("RGB") if as_rgb else grey).save(folder / f"scan{i}.png")
    return folder
