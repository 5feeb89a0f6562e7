"""Pin what `make install` brings: versions in constraints.txt, and files by SHA-256 in requirements.lock.

python tools/lock.py                    after a change of pyproject.toml or of a pin: asks pip, and writes both files
python tools/lock.py --report FILE      the same from a report that `pip install --dry-run --report FILE` has written

The pins of the direct requirements, which are the first part of constraints.txt, are yours to edit; the second part and
the lock are written anew. Hashes are those of the files that pip would take on this machine; those which the lock
already has for the same version stay, because another machine may take another file of it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS, LOCK = ROOT / "constraints.txt", ROOT / "requirements.lock"
EXTRAS = "[mpi,demo,test]"
BUILD = ("setuptools",)                                     # what builds this package, see pyproject.toml
MARK = "# What these bring along, written by tools/lock.py."
LOCK_HEAD = """\
# What `make install LOCKED=1` installs, written by tools/lock.py: for Linux on x86-64 with Python 3.11.
# torch is the build for CPUs: that of the package index also needs NVIDIA's packages, which are not here.
"""
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)")


class Pinned(NamedTuple):
    """A version of a package, and the SHA-256 of its files."""

    version: str
    hashes: frozenset[str]


def canonical(name: str) -> str:
    """'Ruamel.YAML' -> 'ruamel-yaml', as indices compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_report(report: Mapping[str, Any]) -> dict[str, Pinned]:
    """The packages that pip would install, except those of a folder, as this one is.

    A build of its own of the same release, such as 2.13.0+cpu, is pinned as the release.
    """
    found = {}
    for each in report["install"]:
        hashes = each["download_info"].get("archive_info", {}).get("hashes", {})
        if "sha256" in hashes:
            metadata = each["metadata"]
            version = metadata["version"].partition("+")[0]
            found[canonical(metadata["name"])] = Pinned(version, frozenset([hashes["sha256"]]))
    return found


def read_lock(text: str) -> dict[str, Pinned]:
    """The packages of a lock file, whose lines may be continued by a backslash."""
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        if match := PIN.match(line):
            found[canonical(match[1])] = Pinned(match[2], frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", line)))
    return found


def merged(new: Mapping[str, Pinned], old: Mapping[str, Pinned]) -> dict[str, Pinned]:
    """The new packages, with the old hashes of the same versions."""
    return {
        name: Pinned(each.version, each.hashes | old[name].hashes)
        if name in old and old[name].version == each.version else each
        for name, each in new.items()
    }


def lock_text(packages: Mapping[str, Pinned]) -> str:
    """requirements.lock."""
    lines = [
        " \\\n".join([f"{name}=={each.version}", *(f"    --hash=sha256:{sha256}" for sha256 in sorted(each.hashes))])
        for name, each in sorted(packages.items())
    ]
    return LOCK_HEAD + "\n".join(lines) + "\n"


def constraints_text(text: str, packages: Mapping[str, Pinned]) -> str:
    """constraints.txt with another second part; its first part stays as it is."""
    direct = text.partition(MARK)[0].rstrip("\n")
    named = {canonical(match[1]) for line in direct.splitlines() if (match := PIN.match(line))}
    others = [f"{name}=={each.version}" for name, each in sorted(packages.items()) if name not in named]
    return "\n".join([direct, MARK, *others]) + "\n"


def ask_pip(requirements: Iterable[str]) -> dict[str, Any]:
    """The report of what pip would install into an empty environment, with the pins of constraints.txt."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report",
                   str(report), "--constraint", str(CONSTRAINTS), *requirements]
        subprocess.run(command, check=True, cwd=ROOT)
        return json.loads(report.read_text())


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", metavar="FILE", help="a report of pip's, instead of asking it")
    args = parser.parse_args()
    report = json.loads(Path(args.report).read_text()) if args.report else ask_pip([f".{EXTRAS}", *BUILD])
    packages = merged(read_report(report), read_lock(LOCK.read_text()) if LOCK.exists() else {})
    LOCK.write_text(lock_text(packages))
    CONSTRAINTS.write_text(constraints_text(CONSTRAINTS.read_text(), packages))
    print(f"{LOCK.name}: {len(packages)} packages, {sum(len(each.hashes) for each in packages.values())} files")


if __name__ == "__main__":
    main()
