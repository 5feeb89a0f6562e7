"""Pictures of many images: a grid, one with a caption under each image, and rows with names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import IO, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cm.data.decode import MODES
from cm.errors import UserError
from cm.io import storage
from cm.io.terminal import printable

CAPTION_SIZE = 11                                           # of the letters, in pixels
LINE = 14                                                   # height of a caption, in pixels


def image_grid(images: np.ndarray, columns: int, scale: int = 1, gap: int = 1) -> Image.Image:
    """[N,H,W,C] -> one picture, row by row, each pixel `scale` wide; grey if the images are.

    Latents are shown as their channels side by side, from black at -1 to white at 1.
    """
    images = viewable(images)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_h - gap, columns * cell_w - gap, channels), 255, np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * cell_h, place % columns * cell_w
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return to_picture(sheet)


def captioned_grid(images: np.ndarray, captions: Sequence[str], columns: int, scale: int = 1) -> Image.Image:
    """`image_grid` with a caption under each image, shortened to its width; without captions, `image_grid` itself.

    :param captions: one for each image, or none at all.
    """
    if not captions:
        return image_grid(images, columns, scale)
    large = viewable(images).repeat(scale, 1).repeat(scale, 2)
    lines = np.stack([_caption(text, large.shape[2]) for text in captions])             # [N,LINE,W]
    return image_grid(np.concatenate([large, lines[..., None].repeat(large.shape[3], 3)], axis=1), columns)


def _caption(text: str, width: int) -> np.ndarray:
    """uint8 [LINE,width]: black letters on white, in the middle; what is too long ends in dots."""
    font, shown = ImageFont.load_default(CAPTION_SIZE), printable(text)
    whole = shown
    while shown and font.getlength(shown) > width:
        whole = whole[:-1]
        shown = f"{whole}..." if whole else ""
    line = Image.new("L", (width, LINE), 255)
    ImageDraw.Draw(line).text((width / 2, LINE / 2), shown, fill=0, font=font, anchor="mm")
    return np.asarray(line)


def viewable(images: np.ndarray) -> np.ndarray:
    """[N,H,W,C] -> uint8 [N,H,W,C] of pictures, [N,H,W*C,1] of latents: their channels side by side."""
    if images.dtype != np.uint8:
        images = ((images.astype(np.float64) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    if images.shape[3] in MODES:
        return images
    return images.swapaxes(2, 3).reshape(*images.shape[:2], -1, 1)


def to_picture(pixels: np.ndarray) -> Image.Image:
    """uint8 [H,W,3] -> a picture in RGB, [H,W,1] -> one in grey.

    :raises UserError: for other channels, which no picture has.
    """
    channels = pixels.shape[2]
    if channels not in MODES:
        raise UserError(f"samples of {channels} channels are latents and cannot be a PNG: write them to an npz, "
                        "without --outdir")
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def labelled_rows(rows: Sequence[tuple[str, np.ndarray]], scale: int, text_size: int = 16) -> Image.Image:
    """Pictures one above the other, each row of images [n,H,W,C] with its name on the left."""
    font = ImageFont.load_default(text_size)
    strips = [(name, image_grid(images, len(images), scale)) for name, images in rows]
    margin = max(int(font.getlength(line)) for name, _ in strips for line in name.split("\n")) + 2 * text_size
    height = sum(strip.height + text_size // 2 for _, strip in strips) + text_size // 2
    sheet = Image.new("RGB", (margin + max(strip.width for _, strip in strips) + text_size // 2, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = text_size // 2
    for name, strip in strips:
        draw.text((text_size, top + strip.height / 2), name, fill="black", font=font, anchor="lm")
        sheet.paste(strip, (margin, top))
        top += strip.height + text_size // 2
    return sheet


def grid_scale(image_size: int) -> int:
    """The factor by which small images are enlarged for viewing."""
    return max(1, 64 // image_size)


def save_picture(path: str | os.PathLike[str], picture: Image.Image, *, durable: bool = True) -> None:
    """Write a picture as a PNG.

    :param durable: see `storage.write_atomically`.
    :raises UserError: if it cannot be written.
    """
    storage.write_atomically(path, lambda file: picture.save(cast(IO[bytes], file), format="png"), durable=durable)
