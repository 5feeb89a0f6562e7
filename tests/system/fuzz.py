"""Feed damaged files to every reader for some time; a line for each reader, and the file of whatever goes wrong.

    python tests/system/fuzz.py --minutes 30
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from system.fuzz_formats import READERS  # noqa: E402 (after the paths)
from system.test_fuzz import feed, limit_memory  # noqa: E402

ROUND = 40                                                  # examples of a reader before the next one has its turn


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long [default: 10]")
    parser.add_argument("--seed", type=int, default=None, help="of the first round [default: the clock]")
    parser.add_argument("--only", default="", help="readers whose name holds this word [default: all]")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    seed, end = int(time.time()) if args.seed is None else args.seed, time.monotonic() + 60 * args.minutes
    chosen = {name: reader for name, reader in READERS.items() if args.only in name}
    counts: dict[str, Counter] = {name: Counter() for name in chosen}
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    while True:
        for name, reader in chosen.items():
            if time.monotonic() > end:
                return summary(counts, kept)
            place = Path(tempfile.mkdtemp(dir=kept))
            path = reader.prepare(place)
            limit_memory()                                  # anew: what was freed may be kept, and is this process's
            try:
                with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
                    counts[name] += feed(reader, path, max(1, int(ROUND * reader.share)), seed)
            except Exception:                               # its file is the smallest that was found, and stays
                counts[name]["failed"] += 1
                print(f"{name}, seed {seed}: {path}\n{traceback.format_exc(limit=-6)}", flush=True)
                continue
            for file in sorted(place.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            place.rmdir()
        seed += 1


def summary(counts: dict[str, Counter], kept: Path) -> int:
    """Print what was read, refused and worse; 1 if anything was worse."""
    print(f"{'reader':<32}{'read':>10}{'refused':>10}{'failed':>10}")
    for name, count in counts.items():
        print(f"{name:<32}{count['read']:>10}{count['refused']:>10}{count['failed']:>10}")
    failed = sum(count["failed"] for count in counts.values())
    print(f"{sum(map(Counter.total, counts.values()))} files, {failed} rounds failed"
          + (f"; their files are in {kept}" if failed else ""))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
