"""The flags of the evaluation commands, parsed before the imports that take seconds."""

from __future__ import annotations

import argparse

from cm.config import plugins
from cm.config.parser import Parser, add_device, positive
from cm.errors import UserError
from cm.registry import lookup
from evaluations.defaults import (
    BATCH_SIZE,
    EXTRACTOR_CHOICES,
    EXTRACTOR_VARIABLE,
    NEIGHBOURS,
    NO_CACHE,
    NUM_IMAGES,
    PR_DTYPES,
    SPLIT_SIZE,
    cache_folder,
)
from evaluations.metrics import METRICS, default_names
from evaluations.metrics.base import Settings

OPTIONS = {"split_size": SPLIT_SIZE, "k": NEIGHBOURS, "pr_dtype": PR_DTYPES[0]}
"""Options of single metrics -> their defaults."""


def evaluator_parser(description: str) -> Parser:
    """The flags of evaluator.py."""
    parser = Parser(description=description, allow_abbrev=False)
    add_comparison(parser, "tf where TensorFlow is installed and torch elsewhere")
    return parser


def th_evaluator_parser(description: str) -> Parser:
    """The flags of th_evaluator.py."""
    parser = Parser(description=description, allow_abbrev=False)
    add_comparison(parser, "torch")
    return parser


def fid_parser(description: str) -> Parser:
    """The flags of fid.py, of its two commands calc and ref."""
    parser = Parser(description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="calc|ref")
    calc = commands.add_parser("calc", help="compute the distance of images from a reference", allow_abbrev=False)
    calc.add_argument("--images", required=True, metavar="PATH", help="folder, zip or npz of images")
    calc.add_argument("--ref", required=True, metavar="PATH",
                      help="reference: npz of statistics (mu, sigma), or a folder, zip or npz of images")
    calc.add_argument("--num", type=positive, default=NUM_IMAGES,
                      help="number of images to use; fewer are an error, and from more a random subset is chosen "
                           f"[default: {NUM_IMAGES}]")
    calc.add_argument("--json", metavar="FILE", help="write the result, extractor and sources to this JSON file")
    add_cache(calc)
    ref = commands.add_parser("ref", help="write a reference file for a set of images", allow_abbrev=False)
    ref.add_argument("--data", required=True, metavar="PATH",
                     help="folder, zip or npz of images of one size; all are used")
    ref.add_argument("--dest", required=True, metavar="NPZ", help="the file to write")
    ref.add_argument("--images", type=seed, default=0, metavar="N",
                     help="also store N randomly chosen images, for precision, recall and KID [default: 0]")
    ref.add_argument("--image_size", type=positive, metavar="PIXELS",
                     help="crop and resize to this size, exactly as training does [default: unchanged]")
    for command in (calc, ref):
        command.add_argument("--seed", type=seed, default=0, help="seed of the random choice of images [default: 0]")
        command.add_argument("--batch", type=positive, default=BATCH_SIZE,
                             help=f"images per forward pass [default: {BATCH_SIZE}]")
        add_extractor(command, "torch")
    return parser


# --- parts of them -------------------------------------------------------------------------------------------------


def add_comparison(parser: Parser, extractor_default: str) -> None:
    """The flags of commands that compare two npz files."""
    parser.add_argument("ref_batch", help="npz of reference images, statistics, or both")
    parser.add_argument("sample_batch", help="npz of samples: arr_0 uint8 [N,H,W,3]")
    add_extractor(parser, extractor_default)
    parser.add_argument("--json", metavar="FILE", help="write the results, extractor and sources to this JSON file")
    parser.add_argument("--batch_size", type=positive, default=BATCH_SIZE,
                        help=f"images per forward pass [default: {BATCH_SIZE}]")
    parser.add_argument("--split_size", type=positive, default=SPLIT_SIZE,
                        help=f"images per split for the Inception Score [default: {SPLIT_SIZE}]")
    parser.add_argument("--k", type=positive, default=NEIGHBOURS,
                        help=f"number of nearest neighbours for precision and recall [default: {NEIGHBOURS}]")
    parser.add_argument("--metrics", type=metric_names, default="all",
                        help=f"comma-separated, from {', '.join(METRICS)}; all: {', '.join(default_names())} "
                             "[default: all]")
    parser.add_argument("--pr_dtype", choices=PR_DTYPES, default=PR_DTYPES[0],
                        help="precision of the distances for precision and recall; guided-diffusion uses float16 "
                             f"[default: {PR_DTYPES[0]}]")
    parser.add_argument("--class_accuracy", action="store_true",
                        help="also compute the share of samples that the extractor classifies as their label (arr_1)")
    add_cache(parser)


def metric_names(text: str) -> tuple[str, ...]:
    """The metrics of "fid,kid" or "all", each once.

    :raises argparse.ArgumentTypeError: for a name that is not in `METRICS`.
    """
    names = default_names() if text == "all" else tuple(name.strip() for name in text.split(","))
    try:
        for name in names:
            lookup(METRICS, name, "metric")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return tuple(dict.fromkeys(names))


def asked_metrics(args: argparse.Namespace) -> tuple[str, ...]:
    """The metrics of --metrics and --class_accuracy.

    :raises UserError: for an option that differs from its default and that no chosen metric uses.
    """
    asked: list[str] = [*args.metrics, *(["class_accuracy"] if args.class_accuracy else [])]
    names = tuple(dict.fromkeys(asked))
    settings = Settings(args.split_size, args.k, args.pr_dtype)
    used_by = {option: [name for name, metric in METRICS.items() if option in metric.reported(settings, 0)]
               for option in OPTIONS}
    for option, default in OPTIONS.items():
        if getattr(args, option) != default and not set(names) & set(used_by[option]):
            raise UserError(f"--{option} {getattr(args, option)} is for {', '.join(used_by[option])}, and --metrics "
                            f"asks for {', '.join(names)}: add the one or leave out the other")
    return names


def add_extractor(parser: argparse.ArgumentParser, default: str) -> None:
    """The flags of a feature extractor: --inception, --trust_extractor, --plugin, which may add kinds, and --device."""
    parser.add_argument("--inception", metavar="PATH",
                        help=f"feature extractor: {EXTRACTOR_CHOICES} [default: ${EXTRACTOR_VARIABLE}, or {default}]")
    parser.add_argument("--trust_extractor", action="store_true",
                        help="trust the extractor and run it: a TorchScript file is a program")
    plugins.add_flag(parser)
    add_device(parser)


def add_cache(parser: argparse.ArgumentParser) -> None:
    """The flag --cache."""
    parser.add_argument("--cache", metavar="DIR",
                        help=f"folder for cached means and covariances; {NO_CACHE}: none [default: {cache_folder()}]")


def seed(text: str) -> int:
    """An integer that numpy accepts as a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} must lie between 0 and {2**32 - 1}")
    return value
