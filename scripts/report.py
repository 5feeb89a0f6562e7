"""Write one self-contained web page that compares training runs: curves, samples, flags and evaluations.

python scripts/report.py runs/edm runs/cd --out report.html

The page opens from disk in any browser, without a server or a network connection.
"""

from __future__ import annotations

from cm.config import early_exit
from cm.config.flags import Parser, positive

MAX_GRIDS = 12


def make_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the --log_dir of a training run")
    parser.add_argument("--out", default="", metavar="FILE", help="output file [default: report.html in the first run]")
    parser.add_argument("--max_grids", type=positive, default=MAX_GRIDS,
                        help=f"image grids of samples per run, spread over its steps [default: {MAX_GRIDS}]")
    return parser


if __name__ == "__main__":                                  # the imports below take seconds
    early_exit.parse_or_exit(make_parser().parse_args)

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cm.distributed import setup as dist
from cm.io import storage
from cm.report.names import writable
from cm.report.page import page
from cm.report.run_records import read_run


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    runs = [read_run(directory) for directory in args.runs]
    for run in runs:
        for gap in run.problems:
            print(writable(f"{run.path}: {gap}"))
    out = Path(args.out or os.path.join(args.runs[0], "report.html"))
    storage.make_folder(out.parent)
    storage.write_bytes(out, page(runs, args.max_grids, datetime.now()).encode())
    print(writable(f"{out} ({out.stat().st_size / 2**20:.1f} MiB)"))


if __name__ == "__main__":
    dist.run(main)
