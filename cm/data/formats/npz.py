"""Images or latents in memory, and the npz files that hold them; a large one stays on the disk.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import math
import zipfile
from typing import Any

import numpy as np
from PIL import Image

from cm.data import image_source
from cm.data.class_names import CLASS_NAMES, checked
from cm.data.decode import MODES, check_aspect
from cm.data.image_source import Format, ImageSource
from cm.data.labels import MAX_CLASSES, Labels
from cm.data.random_access import RandomAccessFile
from cm.errors import UserError
from cm.io import storage, untrusted
from cm.io.untrusted import Header
from cm.io.zip_directory import content_start


class ArraySource(ImageSource):
    """Images in memory: uint8 [N,H,W,C], or latents as float32.

    :raises UserError: for latents of another size.
    """

    def __init__(self, data_dir: str, image_size: int, images: np.ndarray, labels: Labels):
        self._images = images
        super().__init__(data_dir, image_size, len(images), images.shape[3])
        self.take_labels(labels)
        if images.shape[1:3] == (image_size, image_size):
            self._cache, self._cached[:] = images, True
            self._keeps = True
        else:
            _check_latents(self.channels, images.shape, image_size, data_dir)

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
        return _picture(self._images[i], self.data_dir)

    def __getstate__(self) -> dict[str, Any]:
        """With the images, which are there in any case."""
        return dict(self.__dict__) if self._cache is self._images else super().__getstate__()


class StoredArraySource(ImageSource):
    """The images or latents of a large npz, which stay in its file: of the array, only the header is read here.

    :param start: where in the file its first value lies.
    :param shape: of the array, [N,H,W,C].
    :raises UserError: for latents of another size, and as `check_array`.
    """

    def __init__(self, data_dir: str, image_size: int, channels: int, labels: Labels, start: int, header: Header):
        self.file, self._start = RandomAccessFile(data_dir), start
        self._shape, self._stored = header.shape, header.dtype
        _check_form(header.dtype, header.shape, channels, data_dir)
        super().__init__(data_dir, image_size, header.shape[0], channels)
        self.take_labels(labels)
        _, self.note = with_channels(np.zeros((1, *header.shape[1:]), header.dtype), channels, data_dir)
        self._is_square = header.shape[1:3] == (image_size, image_size)
        if not self._is_square:
            _check_latents(channels, header.shape, image_size, data_dir)

    @property
    def holds_floats(self) -> bool:
        """Whether the array holds floats."""
        return self._stored.kind == "f"

    def name(self, i: int) -> str:
        """The file and the number of the image."""
        return f"{self.data_dir} image {i}"

    def load(self, i: int) -> Image.Image:
        """The complete image i in RGB or, with one channel, in grey (mode L).

        :raises UserError: for latents, which are no pictures, and if it cannot be read.
        """
        return _picture(self._row(i), self.data_dir)

    def _square(self, i: int) -> np.ndarray:
        return self._row(i) if self._is_square else super()._square(i)

    def _row(self, i: int) -> np.ndarray:
        """Row i of the array, with the channels of the source.

        :raises UserError: if it cannot be read, or has numbers that are not finite.
        """
        size = math.prod(self._shape[1:]) * self._stored.itemsize
        try:
            data = self.file.read_at(self._start + i * size, size)
        except OSError as error:
            raise UserError(f"{self.name(i)} cannot be read: {error}") from error
        if len(data) < size:
            raise UserError(f"{self.name(i)} cannot be read: the file was cut off after it was opened")
        row = np.frombuffer(data, self._stored).reshape(1, *self._shape[1:])
        if self.holds_floats and not np.isfinite(row).all():
            raise UserError(f"{self.name(i)}: some of its numbers are NaN or infinite")
        return with_channels(row, self.channels, self.data_dir)[0][0]


def npz_source(data_dir: str, image_size: int, channels: int = 3) -> ImageSource:
    """A sample batch of guided-diffusion: `arr_0` uint8 [N,H,W,C] and, with classes, `arr_1` integers [N].

    Ours also have the names of the classes, `class_names`, where they are known. Arrays of other channels than 1
    and 3 are latents. If they are floats, these are what the network sees. Of more than CACHE_BYTES, `arr_0` stays in
    the file where that is possible.

    :raises UserError: if the file holds something else.
    """
    try:
        with storage.open_file(data_dir, random_access=True) as file, untrusted.open_zip(file) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            stored = _stored_array(archive, data_dir) if "arr_0" in found else None
            wanted = ("arr_0", "arr_1", CLASS_NAMES)[stored is not None :]
            arrays = {key: untrusted.read_member_array(archive, key) for key in wanted if key in found}
    except untrusted.DAMAGE as error:
        raise UserError(f"{data_dir} is not an npz of plain arrays: {error}") from None
    if stored is not None:
        start, header = stored
        classes = _classes(arrays.get("arr_1"), arrays.get(CLASS_NAMES), header.shape[0])
        return StoredArraySource(data_dir, image_size, channels, classes, start, header)
    if "arr_0" not in arrays:
        raise UserError(f"{data_dir} has no images: expected arr_0, found {', '.join(found[:20]) or 'nothing'}")
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    check_array(images, channels, data_dir)
    images, note = with_channels(images, channels, data_dir)
    classes = _classes(labels, arrays.get(CLASS_NAMES), len(images))
    source = ArraySource(data_dir, image_size, images, classes)
    source.note = note
    return source


def _stored_array(archive: zipfile.ZipFile, data_dir: str) -> tuple[int, Header] | None:
    """Where the first value of a large `arr_0` lies in the file, and its header; None for one that is to be read: it is
    small, packed, or not in the order of its images.

    :raises DAMAGE: if it cannot be read, or is cut off.
    """
    info = archive.getinfo("arr_0.npy")
    if info.file_size <= image_source.CACHE_BYTES or info.compress_type != zipfile.ZIP_STORED:
        return None
    with untrusted.open_member(archive, "arr_0.npy") as (member, size):
        header = untrusted.read_header(member, size)
    if header.fortran_order or header.dtype.hasobject or len(header.shape) != 4 or header.missing > 0:
        return None
    return content_start(RandomAccessFile(data_dir).read_at, info.header_offset) + header.offset, header


def _picture(image: np.ndarray, data_dir: str) -> Image.Image:
    """An array [H,W,C] as a picture.

    :raises UserError: for latents, which are none.
    """
    channels = image.shape[2]
    if channels not in MODES:
        raise UserError(f"{data_dir} holds latents of {channels} channels, which cannot be cropped: drop --random_crop")
    return Image.fromarray(image[..., 0] if channels == 1 else image)


def _check_latents(channels: int, shape: tuple[int, ...], image_size: int, data_dir: str) -> None:
    """:raises UserError: for latents of another size than the source's."""
    if channels not in MODES:
        height, width = shape[1:3]
        raise UserError(f"{data_dir} holds latents of {height}x{width}, which cannot be resized to --image_size "
                        f"{image_size}")


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
    _check_form(images.dtype, images.shape, channels, data_dir)
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise UserError(f"{data_dir}: arr_0 is {images.dtype} {list(images.shape)}, and some of its numbers are NaN or "
                        "infinite")


def _check_form(dtype: np.dtype, shape: tuple[int, ...], channels: int, data_dir: str) -> None:
    """:raises UserError: if an array of this kind holds neither pictures nor latents of so many channels."""
    found, is_filled = f"{data_dir}: arr_0 is {dtype} {list(shape)}", 0 not in shape
    if len(shape) == 4 and channels not in MODES and shape[3] == channels and is_filled:
        if dtype != np.uint8 and dtype.kind != "f":
            raise UserError(f"{found}; latents must be floats, which are taken as they are, or uint8")
        return
    if len(shape) != 4 or shape[3] not in MODES or dtype != np.uint8 or not is_filled:
        raise UserError(
            f"{found}; images must be uint8 [N,H,W,3] or [N,H,W,1], latents [N,H,W,C] with --channels C "
            f"(it is {channels} here)"
        )
    try:
        check_aspect(*shape[1:3])
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


FORMAT = Format(lambda data_dir: data_dir.lower().endswith(".npz"), npz_source, "a .npz", is_sent=True)
