"""Images or latents in memory, and the npz files that hold them.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from cm.data.class_names import CLASS_NAMES, checked
from cm.data.decode import MODES, check_aspect
from cm.data.image_source import Format, ImageSource
from cm.data.labels import MAX_CLASSES, Labels
from cm.errors import UserError
from cm.io import storage, untrusted


class ArraySource(ImageSource):
    """Images in memory: uint8 [N,H,W,C], or latents as float32.

    :raises UserError: for latents of another size.
    """

    def __init__(self, data_dir: str, image_size: int, images: np.ndarray, labels: Labels):
        super().__init__(data_dir, image_size, len(images), images.shape[3])
        self._images = images
        self.take_labels(labels)
        if images.shape[1:3] == (image_size, image_size):
            self._cache, self._cached[:] = images, True
        elif self.channels not in MODES:
            height, width = images.shape[1:3]
            raise UserError(f"{data_dir} holds latents of {height}x{width}, which cannot be resized to --image_size "
                            f"{image_size}")

    @property
    def holds_floats(self) -> bool:
        """Whether the array holds floats."""
        return self._images.dtype.kind == "f"

    def name(self, i: int) -> str:
        """The file and the number of the image."""
        return f"{self.data_dir} image {i}"

    def load(self, i: int) -> Image.Image:
        """The complete image i in RGB or, with one channel, in grey (mode L).

        :raises UserError: for latents, which are no pictures.
        """
        if self.channels not in MODES:
            raise UserError(f"{self.data_dir} holds latents of {self.channels} channels, which cannot be cropped: "
                            "drop --random_crop")
        image = self._images[i]
        return Image.fromarray(image[..., 0] if self.channels == 1 else image)


def npz_source(data_dir: str, image_size: int, channels: int = 3) -> ArraySource:
    """A sample batch of guided-diffusion: `arr_0` uint8 [N,H,W,C] and, with classes, `arr_1` integers [N].

    Ours also have the names of the classes, `class_names`, where they are known. Arrays of other channels than 1
    and 3 are latents. If they are floats, these are what the network sees.

    :raises UserError: if the file holds something else.
    """
    try:
        with storage.open_file(data_dir, random_access=True) as file, untrusted.open_zip(file) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            wanted = ("arr_0", "arr_1", CLASS_NAMES)
            arrays = {key: untrusted.read_member_array(archive, key) for key in wanted if key in found}
    except untrusted.DAMAGE as error:
        raise UserError(f"{data_dir} is not an npz of plain arrays: {error}") from None
    if "arr_0" not in arrays:
        raise UserError(f"{data_dir} has no images: expected arr_0, found {', '.join(found[:20]) or 'nothing'}")
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    check_array(images, channels, data_dir)
    images, note = with_channels(images, channels, data_dir)
    classes = _classes(labels, arrays.get(CLASS_NAMES), len(images))
    source = ArraySource(data_dir, image_size, images, classes)
    source.note = note
    return source


def _classes(labels: np.ndarray | None, names: np.ndarray | None, count: int) -> Labels:
    """The classes of `count` images, from the arrays of an npz."""
    if labels is None:
        return Labels(None, "it has no arr_1, so already image 0 has no class")
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        shown = f"arr_1 is {labels.dtype} {list(labels.shape)}, not one class number for each of {count} images"
        return Labels(None, shown)
    try:
        known = () if names is None else checked(names.tolist(), int(labels.max()) + 1)
    except ValueError as error:
        return Labels(None, str(error))
    return Labels(labels.astype(np.int64), "", known, "arr_1")


def check_array(images: np.ndarray, channels: int, data_dir: str) -> None:
    """Check that an array holds pictures, or latents of so many channels.

    :raises UserError: if it does not.
    """
    found = f"{data_dir}: arr_0 is {images.dtype} {list(images.shape)}"
    if images.ndim == 4 and channels not in MODES and images.shape[3] == channels and images.size:
        if images.dtype == np.uint8:
            return
        if images.dtype.kind == "f":
            if not np.isfinite(images).all():
                raise UserError(f"{found}, and some of its numbers are NaN or infinite")
            return
        raise UserError(f"{found}; latents must be floats, which are taken as they are, or uint8")
    if images.ndim != 4 or images.shape[3] not in MODES or images.dtype != np.uint8 or not images.size:
        raise UserError(
            f"{found}; images must be uint8 [N,H,W,3] or [N,H,W,1], latents [N,H,W,C] with --channels C "
            f"(it is {channels} here)"
        )
    try:
        check_aspect(*images.shape[1:3])
    except ValueError as error:
        raise UserError(f"{data_dir}: {error}") from None


def with_channels(images: np.ndarray, channels: int, data_dir: str) -> tuple[np.ndarray, str]:
    """Images [N,H,W,C] with as many channels as are asked for, and what was done to them: grey is repeated, colour
    becomes its luma.

    :raises UserError: if they have others, and none of these is asked for.
    """
    found = images.shape[3]
    if found == channels:
        if images.dtype.kind == "f":
            return np.ascontiguousarray(images, np.float32), f"latents of {channels} channels, taken as they are"
        return np.ascontiguousarray(images), ""
    if (found, channels) == (1, 3):
        return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3))), ""
    if (found, channels) == (3, 1):
        grey = np.stack([np.asarray(Image.fromarray(image).convert(MODES[1])) for image in images])
        return grey[..., None], "its images in colour are converted to their luma"
    raise UserError(f"{data_dir} has images of {found} channels, and --channels is {channels}")


FORMAT = Format(lambda data_dir: data_dir.lower().endswith(".npz"), npz_source, "a .npz")
