"""Decoding one image: which files are images, from their bytes to pixels, and from there to a square of a size."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cm.io.budget import PICTURE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")      # by content; PIL runs a program for EPS
IMAGE_BYTES = PICTURE.bytes                                         # largest file of an image
MODES = {1: "L", 3: "RGB"}                                          # channels of pictures -> their mode in PIL
MAX_ASPECT = 100                                                    # resizing a strip would need unbounded memory


def decode(data: bytes, keep_gray: bool = False) -> Image.Image:
    """An RGB image from the bytes of its file: upright as its EXIF orientation says, transparency on white.

    :param keep_gray: return a grey image as mode L.
    :raises ValueError: if it has more pixels than PIL's safety limit, pixels of more than 8 bits, or extreme sides.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:    # before the checks, only the header is read
        check_aspect(*image.size)
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{image.width}x{image.height} is more than PIL's safety limit of {Image.MAX_IMAGE_PIXELS} pixels"
            )
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are not 8 bits deep (mode {image.mode})")
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:                           # what is transparent hides any colour: white
            return _flatten(upright)
        return upright.convert("L" if keep_gray and upright.mode in ("1", "L") else "RGB")


def _flatten(image: Image.Image) -> Image.Image:
    """An image with transparency on a white background, in RGB."""
    layer = image.convert("RGBA")
    flat = Image.new("RGBA", layer.size, "white")
    flat.alpha_composite(layer)
    return flat.convert("RGB")


def check_aspect(width: int, height: int) -> None:
    """:raises ValueError: if one side is more than MAX_ASPECT times the other."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")


def why_unreadable(error: Exception) -> str:
    """The error of a decoder or an archive as a phrase for a message."""
    return "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)


def images_among(names: list[str]) -> list[str]:
    """The images among these files, in order of their paths and without hidden files."""
    images = [
        name for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.rpartition("/")[2].startswith(".")
    ]
    return sorted(images, key=lambda name: name.split("/"))


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The largest central square of an image, resized, as in guided-diffusion: uint8 [size,size,3]."""
    pixels = np.asarray(resize_shorter_side(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def resize_shorter_side(image: Image.Image, length: int) -> Image.Image:
    """Resize until the shorter side has `length` pixels: halve by box averages while that is possible, then bicubic."""
    while min(image.size) >= 2 * length:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = length / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
