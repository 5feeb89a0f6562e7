"""Pins and hashes of all packages: what pip reports becomes two files, and those of the repository agree."""

import re
from pathlib import Path

import pytest

from tools.lock import (
    CONSTRAINTS,
    LOCK,
    MARK,
    PIN,
    Pinned,
    canonical,
    constraints_text,
    lock_text,
    merged,
    read_lock,
    read_report,
)

ROOT = Path(__file__).resolve().parents[2]
A, B, C = ("abc"[i] * 64 for i in range(3))


def entry(name, release, sha256=None):
    archive = {"archive_info": {"hashes": {"sha256": sha256}}} if sha256 else {"dir_info": {"editable": True}}
    return {"metadata": {"name": name, "version": release}, "download_info": {"url": "x", **archive}}


def test_a_report_becomes_pins_with_hashes():
    found = read_report({"install": [
        entry("Ruamel.Yaml", "1.0", A), entry("torch", "2.13.0+cpu", B), entry("consistency-toolkit", "0.1.0"),
    ]})
    assert found == {"ruamel-yaml": Pinned("1.0", frozenset([A])), "torch": Pinned("2.13.0", frozenset([B]))}


def test_a_lock_reads_back_and_keeps_other_files_of_the_same_version():
    old = {"a": Pinned("1", frozenset([A])), "b": Pinned("1", frozenset([A])), "gone": Pinned("1", frozenset([A]))}
    new = {"a": Pinned("1", frozenset([B])), "b": Pinned("2", frozenset([C]))}
    assert read_lock(lock_text(old)) == old
    both = merged(new, read_lock(lock_text(old)))
    assert both == {"a": Pinned("1", frozenset([A, B])), "b": Pinned("2", frozenset([C]))}
    assert f"a==1 \\\n    --hash=sha256:{A} \\\n    --hash=sha256:{B}\nb==2" in lock_text(both)


def test_direct_pins_stay_and_the_others_are_written_anew():
    packages = {"numpy": Pinned("2", frozenset()), "six": Pinned("1.1", frozenset())}
    text = constraints_text(f"# direct\nNumPy==2\n{MARK}\nold==1\n", packages)
    assert text == f"# direct\nNumPy==2\n{MARK}\nsix==1.1\n"
    assert constraints_text(text, packages) == text


def test_the_repositorys_files_pin_the_same_versions():
    lines = CONSTRAINTS.read_text().splitlines()
    pins = {canonical(match[1]): match[2] for line in lines if (match := PIN.match(line))}
    assert len(pins) == sum(not line.startswith("#") for line in lines), "each line is a pin, and none is there twice"
    locked = read_lock(LOCK.read_text())
    assert {name: each.version for name, each in locked.items()} == pins
    assert all(each.hashes for each in locked.values()) and "setuptools" in locked


@pytest.mark.parametrize("name", ["constraints.txt", "requirements.lock", "Makefile", "pyproject.toml"])
def test_no_file_names_a_host_of_a_package_index(name):
    """Where packages come from is the machine's setting."""
    text = (ROOT / name).read_text()
    assert not re.search(r"pypi|pythonhosted|://|--(extra-)?index-url|--find-links|--trusted-host", text)
