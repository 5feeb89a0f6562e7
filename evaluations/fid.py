"""Compute the Frechet distance of images from a reference (FID in Inception's features), or write a reference file.

python evaluations/fid.py ref --data IMAGES --dest ref.npz --inception inception.pt
mpiexec -n 8 python evaluations/fid.py calc --images SAMPLES --ref ref.npz --inception inception.pt

The commands and flags of NVlabs/edm's fid.py. Batches are cut before the ranks share them out, so the network sees
the same batches, and the number is the same, on any number of ranks. D feature dimensions.
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Parser
from evaluations.flags import fid_parser


def make_parser() -> Parser:
    return fid_parser(__doc__.splitlines()[0])


if __name__ == "__main__":                                  # the imports below take seconds
    early_exit.parse_or_exit(make_parser().parse_args)

import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cm.distributed import setup as dist
from cm.errors import UserError
from evaluations.defaults import NUM_IMAGES
from evaluations.engine.accumulator import (
    POOLED,
    FeatureAccumulator,
    FeatureKind,
    check_finite,
    dims_of,
    moments_over_ranks,
)
from evaluations.engine.comparison import DAMAGED
from evaluations.engine.image_files import CHUNK, Pictures, open_pictures
from evaluations.engine.image_sets import CACHED, COMPUTED, STORED
from evaluations.engine.npz_writer import add_array, new_npz
from evaluations.engine.readers import BatchFile, Statistics, check_same_size
from evaluations.engine.statistics_cache import StatisticsCache, open_cache
from evaluations.evaluator import DESCRIPTION, make_folder_of, side, versions, write_json
from evaluations.features import Extractor, load_extractor
from evaluations.metrics.frechet import frechet
from evaluations.th_evaluator import check_features, label, too_few

JPEG = (".jpg", ".jpeg")
PROBED = 2                                                  # images the extractor is tried on


# --- the features of images ----------------------------------------------------------------------------------------


def choose(num_images: int, num: int, seed: int) -> NDArray[np.int64]:
    """Indices of `num` images, ascending; the choice of NVlabs/edm for the same seed."""
    return np.sort(np.random.RandomState(seed).permutation(num_images)[:num])


def probe_features(pictures: Pictures, indices: NDArray[np.int64], extractor: Extractor) -> dict[FeatureKind, int]:
    """The kinds of features that the extractor gives, and their dimensions, asked of the first images."""
    return dims_of(extractor.extract(next(pictures.take([indices[:PROBED]]))))


def measure(
    pictures: Pictures,
    indices: NDArray[np.int64],
    extractor: Extractor,
    batch_size: int,
    dims: Mapping[FeatureKind, int],
) -> dict[FeatureKind, Statistics]:
    """Mean and covariance of the chosen images' features; one step of all ranks together.

    :raises UserError: if an image cannot be read, or a feature is not finite.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = np.split(indices, range(batch_size, len(indices), batch_size))
    rounds = [sum(map(len, groups[first : first + ranks])) for first in range(0, len(groups), ranks)]
    mine = groups[rank::ranks]
    accumulator = FeatureAccumulator(dims)
    with tqdm(total=len(indices), desc=f"features of {pictures.path}", unit="img", disable=rank > 0) as bar:
        for group, images, done in zip(mine, pictures.take(mine), rounds):
            features = extractor.extract(images)
            check_finite(features, extractor, pictures.path, lambda row, group=group: pictures.name(group[row]))
            accumulator.add(features, int(group[0]))
            bar.update(done)
    return {
        kind: Statistics(*moments_over_ranks(sums).finalize(), extractor.id, len(indices))
        for kind, sums in accumulator.moments.items()
    }


def check_two(pictures: Pictures) -> None:
    if len(pictures) < 2:
        raise UserError(f"{pictures.path} has 1 image; a covariance needs at least 2")


# --- calc ----------------------------------------------------------------------------------------------------------


def calc(
    images: str, ref: str, extractor: Extractor, *, num: int = NUM_IMAGES, seed: int = 0, batch_size: int = 64,
    cache: StatisticsCache | None = None,
) -> dict[str, Any]:
    """The distance of images from a reference; one step of all ranks together, the same result on each.

    :param images: folder, zip or npz.
    :param ref: npz of statistics, or a data set: folder, zip, or npz of images.
    :param num: how many of the images; a seeded choice if there are more.
    :param batch_size: images per pass of the network.
    :param cache: where means and covariances are looked for and kept.
    :returns: what --json writes.
    :raises UserError: if there are fewer images than `num`, they or the reference cannot be used, or the reference
        stores features of another extractor.
    """
    start = time.monotonic()
    reference = open_statistics(ref)
    pictures = open_pictures(images, "--images")
    check_two(pictures)
    if not 2 <= num <= len(pictures):
        raise UserError(f"{images} has {len(pictures)} images, and --num asks for {num}: it may be 2 to "
                        f"{len(pictures)}. Distances are comparable only at equal numbers")
    indices = choose(len(pictures), num, seed)
    dims = {POOLED: probe_features(pictures, indices, extractor)[POOLED]}
    source = STORED
    if reference is None:
        ref_pictures = open_pictures(ref, "--ref")
        check_two(ref_pictures)
        everything = np.arange(len(ref_pictures))
        firsts = {images: next(pictures.take([indices[:1]])), ref: next(ref_pictures.take([everything[:1]]))}
        check_same_size({path: first.shape[1:3] for path, first in firsts.items()})
        reference, source = measure_or_recall(ref_pictures, everything, extractor, batch_size, dims, cache)
    check_features(ref, reference, extractor, dims[POOLED])
    choice = f"{num}-of-{len(pictures)}-seed{seed}" if num < len(pictures) else ""
    found, found_source = measure_or_recall(pictures, indices, extractor, batch_size, dims, cache, choice)
    parts = dist.on_main(frechet, reference.mu, reference.sigma, found.mu, found.sigma)
    counts = sorted({num, reference.num_images or num})
    warnings = [too_few(count, dims[POOLED]) for count in counts if count < dims[POOLED]]
    if any(pictures.name(i).lower().endswith(JPEG) for i in indices.tolist()):
        warnings.append(f"{images} holds JPEG files, whose compression changes features: keep samples as PNG or npz")
    if parts.clipped > DAMAGED:
        warnings.append(f"a covariance has negative eigenvalues, so the statistics of {ref} are damaged")
    return {
        "value": parts.distance,
        "label": label("frechet_distance", extractor),
        "clipped": parts.clipped,
        "images": images,
        "images_source": found_source,
        "num_images": num,
        "seed": seed,
        "reference": ref,
        "reference_count": reference.num_images,
        "reference_source": source,
        "extractor": {name: getattr(extractor, name) for name in DESCRIPTION},
        "warnings": warnings,
        "versions": versions(),
        "seconds": round(time.monotonic() - start, 3),
    }


def open_statistics(ref: str) -> Statistics | None:
    """Those that an npz stores; None for images, whatever they come in."""
    return BatchFile(ref).statistics(POOLED.suffix) if ref.lower().endswith(".npz") else None


def measure_or_recall(
    pictures: Pictures, indices: NDArray[np.int64], extractor: Extractor, batch_size: int,
    dims: Mapping[FeatureKind, int], cache: StatisticsCache | None, choice: str = "",
) -> tuple[Statistics, str]:
    """Statistics of the pooled features of the chosen images, and whether they were computed now or are cached."""
    if cache is not None:
        known = dist.on_main(cache.load, pictures.path, extractor.id, POOLED.suffix, choice)
        if known is not None:
            return known, CACHED
    found = measure(pictures, indices, extractor, batch_size, dims)[POOLED]
    if cache is not None:
        dist.on_main(cache.save, pictures.path, found, POOLED.suffix, choice)
    return found, COMPUTED


def report(result: Mapping[str, Any]) -> str:
    """Where the number comes from, its warnings, and on the last line the bare number."""
    provenance = "; ".join([
        side("images", result["num_images"], result["images_source"]),
        side("reference", result["reference_count"], result["reference_source"]),
        "extractor: {name} ({id}), resize: {resize}".format(**result["extractor"]),
    ])
    warnings = [f"warning: {text}" for text in result["warnings"]]
    return "\n".join([*warnings, f"{result['label']}  [{provenance}]", f"{result['value']:g}"])


# --- ref -----------------------------------------------------------------------------------------------------------


def ref(
    data: str, dest: str, extractor: Extractor, *, num_images: int = 0, seed: int = 0, batch_size: int = 64
) -> str:
    """Write a reference of all images of a set; one step of all ranks together, the same result on each.

    The keys are those that `evaluations.engine.readers` lists. A file that stood under `dest` stays until the new one
    is complete.

    :param data: folder, zip or npz.
    :param num_images: how many of the images, in a seeded choice, the file holds besides (precision, recall and KID
        need them).
    :returns: what was written, in a line.
    :raises UserError: if the images cannot be used, or are fewer than `num_images`, or `dest` cannot be written.
    """
    pictures = open_pictures(data, "--data")
    check_two(pictures)
    if num_images > len(pictures):
        raise UserError(f"{data} has {len(pictures)} images, and --images asks for {num_images} of them")
    check_dest(dest, data)
    verb = "replaced" if os.path.exists(dest) else "wrote"
    indices = np.arange(len(pictures))
    found = measure(pictures, indices, extractor, batch_size, probe_features(pictures, indices, extractor))
    arrays = {"extractor": np.array(extractor.id), "num_images": np.array(len(pictures))}
    for kind, statistics in found.items():
        arrays |= {f"mu{kind.suffix}": statistics.mu, f"sigma{kind.suffix}": statistics.sigma}
    kept = choose(len(pictures), num_images, seed)
    if len(kept) and pictures.labels is not None:
        arrays["arr_1"] = pictures.labels[kept]
    dist.on_main(write_npz, dest, arrays, pictures, kept)
    means = ", ".join(f"mu{kind.suffix} {list(statistics.mu.shape)}" for kind, statistics in found.items())
    dim = len(found[POOLED].mu)
    warning = f"\nwarning: {too_few(len(pictures), dim)}" if len(pictures) < dim else ""
    return (
        f"{verb} {dest}: {means} of {len(pictures)} images, {len(kept)} of them "
        f"inside; extractor: {extractor.name} ({extractor.id}), resize: {extractor.resize}{warning}"
    )


def check_dest(dest: str, data: str) -> None:
    """Find out before the work whether the file can be written."""
    if os.path.realpath(dest) == os.path.realpath(data):
        raise UserError(f"--dest {dest} is the data itself, which it would replace; name another file")
    if os.path.isdir(dest):
        raise UserError(f"--dest {dest} is a folder; name an npz file in it")
    os.makedirs(os.path.dirname(os.path.abspath(dest)), exist_ok=True)


def write_npz(dest: str, arrays: Mapping[str, NDArray], pictures: Pictures, kept: NDArray[np.int64]) -> None:
    """An npz of arrays and of the images `kept` as arr_0, which are never all in memory."""
    with new_npz(dest) as archive:
        if len(kept):
            write_images(archive, pictures, kept)
        for name, array in arrays.items():
            add_array(archive, name, array)


def write_images(archive: zipfile.ZipFile, pictures: Pictures, kept: NDArray[np.int64]) -> None:
    with archive.open("arr_0.npy", "w", force_zip64=True) as member:
        for number, images in enumerate(pictures.take(np.split(kept, range(CHUNK, len(kept), CHUNK)))):
            if number == 0:
                form = {"descr": "|u1", "fortran_order": False, "shape": (len(kept), *images.shape[1:])}
                np.lib.format.write_array_header_1_0(member, form)
            member.write(images.tobytes())


# --- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    dist.setup_dist()
    extractor = load_extractor(args.inception, dist.dev())
    if args.command == "ref":
        text = ref(args.data, args.dest, extractor, num_images=args.images, seed=args.seed, batch_size=args.batch)
    else:
        make_folder_of(args.json)
        result = calc(args.images, args.ref, extractor, num=args.num, seed=args.seed, batch_size=args.batch,
                      cache=open_cache(args.cache))
        text = report(result)
        if dist.is_main():
            write_json(args.json, result)
    if dist.is_main():
        print(text)


if __name__ == "__main__":
    dist.run(main)
