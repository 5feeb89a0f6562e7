"""A reference file for a set of images: the work of `fid.py ref`."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm.data.class_names import CLASS_NAMES
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io.outputs import Output, check_outputs
from cm.io.storage import make_folder
from evaluations.engine.accumulator import Wanted, dims_of, pass_over
from evaluations.engine.image_files import CHUNK, Pictures, open_pictures
from evaluations.engine.image_sets import Choose, check_two
from evaluations.engine.images import FileImages
from evaluations.engine.npz_writer import add_arrays, write_npz
from evaluations.engine.ranks import JobRanks
from evaluations.engine.readers import Statistics
from evaluations.engine.results import too_few
from evaluations.features.base import Extractor
from evaluations.metrics.base import POOLED


def write_reference(
    data: str, dest: str, extractor: Extractor, num_images: int, seed: int, batch_size: int, image_size: int | None,
    choose: Choose,
) -> str:
    """The implementation of `evaluations.fid.ref`, which describes the arguments."""
    pictures = open_pictures(data, "--data", image_size)
    check_two(pictures)
    count = len(pictures)
    if num_images > count:
        raise UserError(f"{data} has {count} images, and --images asks for {num_images} of them: give --images {count} "
                        "or fewer, or a data set with more")
    dist.on_main(_check_dest, dest, data)
    verb = "replaced" if dist.on_main(os.path.exists, dest) else "wrote"
    images = FileImages(pictures)
    wanted = Wanted(dims_of(extractor.extract(images.first_images)))
    gathered = pass_over(images, extractor, wanted, batch_size, JobRanks(), progress=True)
    arrays: dict[str, NDArray[Any]] = {}
    for kind, moments in gathered.moments.items():
        statistics = Statistics(*moments.finalize(), extractor.id, count, images.size, extractor.resize)
        arrays |= statistics.arrays(kind.suffix)
    kept = choose(count, num_images, seed)
    if len(kept) and pictures.labels is not None:
        arrays["arr_1"] = pictures.labels[kept]
    if pictures.class_names:
        arrays[CLASS_NAMES] = np.asarray(pictures.class_names)
    dist.on_main(_write, dest, arrays, pictures, kept)
    means = ", ".join(f"mu{kind.suffix} {list(arrays[f'mu{kind.suffix}'].shape)}" for kind in gathered.moments)
    dim = wanted.dims[POOLED]
    warning = f"\nwarning: {too_few(count, dim)}" if count < dim else ""
    cropped = f", cropped and resized to {image_size}x{image_size} as for training" if image_size else ""
    return (
        f"{verb} {dest}: {means} of {count} images{cropped}, {len(kept)} of them "
        f"inside; extractor: {extractor.name} ({extractor.id}), resize: {extractor.resize}{warning}"
    )


def _check_dest(dest: str, data: str) -> None:
    """Find out before the work whether the file can be written."""
    if os.path.realpath(dest) == os.path.realpath(data):
        raise UserError(f"--dest {dest} is the data itself, which it would replace; name another file")
    if os.path.isdir(dest):
        raise UserError(f"--dest {dest} is a folder; name an npz file in it")
    check_outputs([Output("--dest", dest, beside_input=True)], {"--data": data})
    make_folder(os.path.dirname(os.path.abspath(dest)))


def _write(dest: str, arrays: Mapping[str, NDArray[Any]], pictures: Pictures, kept: NDArray[np.int64]) -> None:
    """An npz of arrays and of the images `kept` as arr_0, which are never all in memory."""
    def fill(archive: zipfile.ZipFile) -> None:
        if len(kept):
            _write_images(archive, pictures, kept)
        add_arrays(archive, arrays)

    write_npz(dest, fill)


def _write_images(archive: zipfile.ZipFile, pictures: Pictures, kept: NDArray[np.int64]) -> None:
    with archive.open("arr_0.npy", "w", force_zip64=True) as member:
        for number, images in enumerate(pictures.take(np.split(kept, range(CHUNK, len(kept), CHUNK)))):
            if number == 0:
                form = {"descr": "|u1", "fortran_order": False, "shape": (len(kept), *images.shape[1:])}
                np.lib.format.write_array_header_1_0(member, form)
            member.write(images.tobytes())
