"""Write one self-contained web page that compares training runs: curves, samples, flags and evaluations.

python scripts/report.py runs/edm runs/cd --out report.html
python scripts/report.py runs/* --out report.html

Folders and files that are not a run are skipped. The page opens from disk in any browser, without a server or a network
connection.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cm.config import early_exit
from cm.config.parser import Parser, positive
from cm.errors import UserError
from cm.io import storage
from cm.io.outputs import Output, check_outputs
from cm.report.names import writable
from cm.report.page import page
from cm.report.run_records import RunRecord, read_run

MAX_GRIDS = 12


def read_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a command line, by default that of this process."""
    parser = Parser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the --log_dir of a training run")
    parser.add_argument("--out", default="", metavar="FILE", help="output file [default: report.html in the first run]")
    parser.add_argument("--max_grids", type=positive, default=MAX_GRIDS,
                        help=f"number of sample grids per run, spread over its steps [default: {MAX_GRIDS}]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Write the page, and print what is missing in the runs."""
    runs, passed_over = read_runs(args.runs)
    out = Path(args.out or runs[0].path / "report.html")
    check_outputs([Output("--out", out, beside_input=True)], dict(zip(args.runs, args.runs)))
    for reason in passed_over:
        print(writable(f"passed over: {reason}"))
    for run in runs:
        for problem in run.problems:
            print(writable(f"{run.path}: {problem}"))
    storage.make_folder(out.parent)
    storage.write_bytes(out, page(runs, args.max_grids, datetime.now(), passed_over).encode())
    print(writable(f"{out} ({out.stat().st_size / 2**20:.1f} MiB)"))


def read_runs(directories: Sequence[str]) -> tuple[list[RunRecord], list[str]]:
    """The runs among these paths, and why the others are none.

    :raises UserError: if a path does not exist, or none is a run.
    """
    runs, reasons = [], []
    for directory in directories:
        if not os.path.lexists(directory):
            raise UserError(f"{directory} does not exist; give the --log_dir of a training run")
        try:
            runs.append(read_run(directory))
        except UserError as error:
            reasons.append(str(error))
    if not runs:
        raise UserError(f"there is no run here: {'; '.join(reasons)}")
    return runs, reasons


if __name__ == "__main__":
    early_exit.run_script(read_flags, main)
