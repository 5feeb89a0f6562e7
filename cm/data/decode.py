"""One picture: which files are pictures, from their bytes to pixels, and from there to a square of a size."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")      # PIL goes by content, and hands EPS to a program
PICTURE_BYTES = 512 * 2**20                                         # largest file of a picture
MAX_ASPECT = 100                                                    # a strip would grow beyond all bounds when resized


def decode(data: bytes, keep_gray: bool = False) -> Image.Image:
    """A picture in RGB from the bytes of its file.

    :param keep_gray: leave a grey picture grey (mode L).
    :raises ValueError: if it has more pixels than PIL holds safe, or pixels that do not fit in 8 bits, or is a strip.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:    # the header alone is read before the checks
        check_aspect(*image.size)
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{image.width}x{image.height} is more than PIL's safety limit of {Image.MAX_IMAGE_PIXELS} pixels"
            )
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are not 8 bits deep (mode {image.mode})")
        return image.convert("L" if keep_gray and image.mode in ("1", "L") else "RGB")


def check_aspect(width: int, height: int) -> None:
    """:raises ValueError: for a strip."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")


def why_unreadable(error: Exception) -> str:
    """What a decoder or an archive complains about, in words for people."""
    return "it is no picture" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)


def images_among(names: list[str]) -> list[str]:
    """The images among files, in order of their paths; hidden files are no images."""
    images = [
        name for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.rpartition("/")[2].startswith(".")
    ]
    return sorted(images, key=lambda name: name.split("/"))


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The largest central square of a picture at another size, as in guided-diffusion: uint8 [size,size,3]."""
    pixels = np.asarray(resize_shorter_side(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def resize_shorter_side(image: Image.Image, length: int) -> Image.Image:
    """Resize until the shorter side has `length` pixels: halve by box averages while that is possible, then bicubic."""
    while min(image.size) >= 2 * length:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = length / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
