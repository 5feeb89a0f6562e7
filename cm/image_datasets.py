"""openai/consistency_models' `cm.image_datasets`: batches of a rank, and a folder of images as a torch Dataset.

A compatibility module: `load_data` is that of `cm.data.loader`, for this process's rank; pictures are decoded and
resized by `cm.data.decode`.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from cm.data import loader
from cm.data.decode import centre_crop, decode, images_among, resize_shorter_side, why_unreadable
from cm.data.loader import CROP_FRACTION, BatchStream
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import storage

__all__ = ["ImageDataset", "center_crop_arr", "load_data", "random_crop_arr"]


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
) -> BatchStream:
    """An endless iterator of this rank's batches, which unpack as `images, cond`.

    `images` is float32 [batch_size,3,image_size,image_size] in [-1, 1]; `cond` is {"y": int64 [batch_size]} with
    `class_cond`, else empty. To resume at a sample, or for another seed, call `cm.data.loader.load_data`.

    :param batch_size: images per step on this rank, the same on all ranks.
    :param deterministic: images in the order of the set rather than shuffled anew each epoch.
    :raises UserError: if there are no images, or classes are asked for and missing.
    """
    return loader.load_data(
        data_dir=data_dir, batch_size=batch_size, image_size=image_size, class_cond=class_cond,
        deterministic=deterministic, random_crop=random_crop, random_flip=random_flip,
        rank=dist.get_rank(), world_size=dist.get_world_size(),
    )


def _list_image_files_recursively(data_dir: str) -> list[str]:
    """Paths of the images in a folder and the folders in it, in order of their names; hidden files are left out."""
    return [os.path.join(data_dir, name) for name in images_among(storage.files_under(data_dir))]


class ImageDataset(Dataset):
    """Images of a list of files, cropped to squares and flipped at random: `(image, cond)` for each.

    `image` is float32 [3,resolution,resolution] in [-1, 1], `cond` {"y": int64} with classes, else empty. Crops and
    flips come from the module `random`. The toolkit's own loader is quicker, and repeats itself on any number of ranks.

    :param image_paths: local files.
    :param classes: the class of each file, or None.
    :param shard, num_shards: this process takes every num_shards-th file, beginning with number `shard`.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ):
        super().__init__()
        self.resolution = resolution
        self.local_images = list(image_paths[shard:][::num_shards])
        self.local_classes = None if classes is None else list(classes[shard:][::num_shards])
        self.random_crop, self.random_flip = random_crop, random_flip

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """
        :raises UserError: if the file is no picture; the message names it.
        """
        crop = random_crop_arr if self.random_crop else center_crop_arr
        pixels = crop(_open(self.local_images[idx]), self.resolution)               # [S,S,3] uint8
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        image = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) / 127.5 - 1
        cond = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], np.int64)}
        return image, cond


def center_crop_arr(pil_image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """The largest central square of a picture at another size: uint8 [image_size,image_size,3]."""
    return centre_crop(pil_image, image_size)


def random_crop_arr(
    pil_image: Image.Image, image_size: int, min_crop_frac: float = CROP_FRACTION, max_crop_frac: float = 1.0
) -> NDArray[np.uint8]:
    """A random square of a picture: uint8 [image_size,image_size,3]. Drawn from the module `random`.

    :param min_crop_frac, max_crop_frac: bounds of the square's side over the shorter side of the picture.
    """
    lowest, highest = (math.ceil(image_size / fraction) for fraction in (max_crop_frac, min_crop_frac))
    pixels = np.asarray(resize_shorter_side(pil_image, random.randint(lowest, highest)))
    top, left = (random.randint(0, side - image_size) for side in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]


def _open(path: str) -> Image.Image:
    try:
        return decode(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {why_unreadable(error)}; remove it or replace it") from None
