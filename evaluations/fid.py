"""Compute the Frechet distance of images from a reference (FID in Inception's features), or write a reference file.

python evaluations/fid.py ref --data IMAGES --dest ref.npz --inception inception.pt
mpiexec -n 8 python evaluations/fid.py calc --images SAMPLES --ref ref.npz --inception inception.pt

The commands and flags are those of NVlabs/edm's fid.py. The batches do not depend on the number of ranks, so the result
is the same on any number of ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cm.config.parser import Parser
from cm.errors import UserError
from evaluations import command
from evaluations.defaults import BATCH_SIZE, NUM_IMAGES
from evaluations.flags import fid_parser
from evaluations.report import side

if TYPE_CHECKING:                                           # what takes seconds to import is imported when it is used
    from evaluations.engine.statistics_cache import StatisticsCache
    from evaluations.features import Extractor

__all__ = ["calc", "choose", "main", "make_parser", "ref", "report"]


def make_parser() -> Parser:
    """The flags of this command."""
    return fid_parser("Compute the Frechet distance of images from a reference, or write a reference file.")


def choose(num_images: int, num: int, seed: int) -> NDArray[np.int64]:
    """Indices of `num` images, ascending; the choice of NVlabs/edm for the same seed."""
    return np.sort(np.random.RandomState(seed).permutation(num_images)[:num])


def calc(
    images: str, ref: str, extractor: Extractor, *, num: int = NUM_IMAGES, seed: int = 0, batch_size: int = BATCH_SIZE,
    cache: StatisticsCache | None = None,
) -> dict[str, Any]:
    """The distance of images from a reference, the same on every rank. All ranks must call it.

    :param images: folder, zip or npz.
    :param ref: npz of statistics, or a data set: folder, zip, or npz of images.
    :param num: number of images to use; from more, a random subset is chosen with `seed`.
    :param batch_size: images per pass of the network.
    :param cache: the cache for means and covariances.
    :returns: the content of the file of --json.
    :raises UserError: on every rank, if there are fewer images than `num`, they or the reference cannot be used, or the
        reference stores features of another extractor, image size or resize rule.
    """
    from evaluations.engine.image_sets import distance

    return distance(images, ref, extractor, num, seed, batch_size, cache, choose)


def ref(
    data: str, dest: str, extractor: Extractor, *, num_images: int = 0, seed: int = 0, batch_size: int = BATCH_SIZE,
    image_size: int | None = None,
) -> str:
    """Write a reference file of all images of a data set. All ranks must call it.

    `evaluations.engine.readers` lists its keys. An existing file at `dest` stays until the new one is complete.

    :param data: folder, zip or npz.
    :param num_images: number of images to store as well, chosen at random with `seed`; precision, recall and KID need
        them.
    :param image_size: side in pixels to crop and resize to, as training does; None: unchanged.
    :returns: one line of text about the file that was written.
    :raises UserError: on every rank, if the images cannot be used, or are fewer than `num_images`, or `dest` cannot be
        written.
    """
    from evaluations.engine.reference_file import write_reference

    return write_reference(data, dest, extractor, num_images, seed, batch_size, image_size, choose)


def report(result: Mapping[str, Any]) -> str:
    """Warnings, the number with its provenance, and on the last line the number alone."""
    provenance = "; ".join([
        side("images", result["num_images"], result["images_source"]),
        side("reference", result["reference_count"], result["reference_source"]),
        "extractor: {name} ({id}), resize: {resize}".format(**result["extractor"]),
    ])
    warnings = [f"warning: {text}" for text in result["warnings"]]
    return "\n".join([*warnings, f"{result['label']}  [{provenance}]", f"{result['value']:g}"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in this process."""
    _run(make_parser().parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    from cm.distributed import setup as dist
    from cm.io.storage import write_json
    from cm.io.terminal import without_controls
    from evaluations.engine.statistics_cache import open_cache
    from evaluations.features import load_extractor

    dist.setup_dist(device=args.device)
    extractor = load_extractor(args.inception, dist.dev(), trusted=args.trust_extractor)
    if args.command == "ref":
        command.prepare_output(args, "--dest")
        if args.seed and not args.images:
            raise UserError(f"--seed {args.seed} chooses the --images that the file holds: give both, or neither")
        text = ref(args.data, args.dest, extractor, num_images=args.images, seed=args.seed, batch_size=args.batch,
                   image_size=args.image_size)
    else:
        command.prepare_output(args, "--json", "--images", "--ref")
        result = calc(args.images, args.ref, extractor, num=args.num, seed=args.seed, batch_size=args.batch,
                      cache=open_cache(args.cache))
        text = report(result)
        if args.json:
            dist.on_main(write_json, args.json, result)
    if dist.is_main():
        print(without_controls(text))


if __name__ == "__main__":
    command.start(make_parser, _run)
