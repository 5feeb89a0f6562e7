"""Opening a set of images: the table of formats, and the choice of the format for a path.

A source gives the pixels, the class and the name of image i, see `cm.data.image_source`. `cm.data.decode` decodes the
files; `cm.data.loader` makes the order, the augmentation and the batches.
"""

from __future__ import annotations

import os

from cm.data.decode import images_among
from cm.data.formats import digits, folder, npz, webdataset, zip_archive
from cm.data.image_source import EncodedSource, Format, ImageSource
from cm.data.latents import arrays_among
from cm.data.streams import ImageStream
from cm.errors import UserError
from cm.io import storage
from cm.registry import Table

FORMATS: Table[Format] = Table("data format", {
    "digits": digits.FORMAT,
    "zip": zip_archive.FORMAT,
    "npz": npz.FORMAT,
    "webdataset": webdataset.FORMAT,
    "folder": folder.FORMAT,                    # every other name
})
"""The formats; the first one that claims a name is used."""

SOURCES = {name: each.open for name, each in FORMATS.items() if not each.is_stream}


def open_source(
    data_dir: str, image_size: int, flag: str = "--data_dir", labels: str = "auto", channels: int = 3,
    latents: bool = False,
) -> ImageSource:
    """Open a set of images.

    The first of FORMATS that claims `data_dir` opens it: the word `digits`; a name that ends in `.zip` or `.npz`; else
    a folder (a folder called digits is `./digits`). Classes of folders and zips come from a `dataset.json` at their
    root, as EDM writes it, or else from sub-folders where there are several, or else from file names
    `{class}_{anything}`.

    :param data_dir: the word, a path, or a URL that blobfile can read, such as gs://bucket/images.
    :param image_size: side of the square images in pixels.
    :param flag: the name of data_dir in messages.
    :param labels: "folders" or "names" for one of these rules alone, see `cm.data.labels.RULES`.
    :param channels: 3 for RGB, where grey is repeated; 1 for grey, to which colour is converted; others for latents.
    :param latents: accept a set of means and standard deviations of latents, too; its own size and channels are then
        used.
    :raises UserError: if there is nothing of that name, it holds no images, or its content does not fit its name.
    """
    if image_size < 1:
        raise UserError(f"--image_size {image_size}: images need at least one pixel")
    format = find_format(data_dir, flag)
    if format.is_stream:
        raise UserError(f"{flag} {data_dir}: {format.what} are a stream, which only training can read; unpack them "
                        "into a folder")
    _check_exists(data_dir, format, flag)
    source = format.open(data_dir.rstrip("/") or "/", image_size, channels)
    if source.holds_moments:
        if not latents:
            raise UserError(f"{flag} {data_dir} contains latents, but images are needed: give the images themselves")
        source.take_shape()
    if labels != "auto" and isinstance(source, EncodedSource):
        source.label_by(labels)
    return source


def may_hold_moments(data_dir: str) -> bool:
    """Whether a zip or a folder may hold latents, see `cm.data.latents`; decided quickly, from its first file.

    False if it does not exist.
    """
    kind = find_format(data_dir)
    if kind not in (zip_archive.FORMAT, folder.FORMAT) or not storage.exists(data_dir):
        return False
    if storage.is_directory(data_dir):
        names = (name for _, _, names in storage.walk(data_dir) for name in names)
    elif kind is zip_archive.FORMAT:
        names = zip_archive.first_names(data_dir)
    else:
        return False
    return next((is_array for name in names if (is_array := _is_array(name)) is not None), False)


def _is_array(name: str) -> bool | None:
    """True for an array, False for an image, None for any other file."""
    if arrays_among([name]):
        return True
    return False if images_among([name]) else None


def open_everywhere(
    data_dir: str, image_size: int, labels: str = "auto", channels: int = 3, latents: bool = False
) -> ImageSource:
    """`open_source` on all ranks together: rank 0 lists the images, and sends the list to the others.

    If a source of this format cannot be sent, every rank opens it.

    :raises UserError: on every rank, for the reasons of `open_source`.
    """
    from cm.distributed.collectives import on_main_arrays  # imports torch, which --help does without

    arguments = (data_dir, image_size, "--data_dir", labels, channels, latents)
    return on_main_arrays(open_source, *arguments) if find_format(data_dir).is_sent else open_source(*arguments)


def open_stream(data_dir: str) -> ImageStream | None:
    """Open the stream of a name; None if it is a set of images that can be read in any order.

    :raises UserError: if the name is empty, or the stream cannot be opened.
    """
    format = find_format(data_dir)
    return format.open(data_dir.rstrip("/")) if format.is_stream else None


def find_format(data_dir: str, flag: str = "--data_dir") -> Format:
    """The first of FORMATS that claims a name.

    :raises UserError: if the name is empty.
    """
    if not data_dir:
        raise UserError(f"{flag} is empty: name {choices()}")
    return next(each for each in FORMATS.values() if each.claims(data_dir))


def choices() -> str:
    """The formats as a phrase."""
    *others, last = (each.what for each in reversed(FORMATS.values()))
    return f"{', '.join(others)} or {last}"


def _check_exists(path: str, format: Format, flag: str) -> None:
    """:raises UserError: if there is nothing, or a file instead of a folder, or a folder instead of a file."""
    if format.on_disk == "no":
        return
    if not storage.exists(path):
        raise UserError(f"{flag} {path} does not exist (looked for from {os.getcwd()})")
    if format.on_disk != "any" and storage.is_directory(path) != (format.on_disk == "folder"):
        found, wanted = ("file", choices()) if format.on_disk == "folder" else ("folder", "a file")
        raise UserError(f"{flag} {path} is a {found}; expected {wanted}")
