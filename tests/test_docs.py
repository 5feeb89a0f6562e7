"""The Markdown files refer only to existing files, links, headings and flags."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from cm.config.parser import FOREIGN_FLAGS as FLAGS_OF_OTHER_TOOLS

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = {".venv", ".pytest_cache", "runs"}
PAGES = sorted(path for path in ROOT.rglob("*.md") if not FOREIGN & {*path.relative_to(ROOT).parts})
CODE_FOLDERS = ("scripts", "evaluations", "datasets", "benchmarks", "tests/system", "cm/config")

# A path from the root of the repository.
PATHS = re.compile(r"(?<![\w/.-])((?:cm|scripts|evaluations|tests|docs|configs|datasets|benchmarks)/[\w./-]*\w/?)")
LINKS = re.compile(r"\]\(([^)\s]+)\)")
FLAGS = re.compile(r"(?<![\w-])--([A-Za-z]\w*(?:-\w+)*)")
OWN_FLAGS = re.compile(r"^    (\w+): \w+ = option\(", flags=re.MULTILINE)               # of an example of a plugin

FOREIGN_FLAGS = {
    # NVlabs/edm's train.py and generate.py
    "cond", "xflip", "duration", "batch-gpu", "cbase", "cres", "ema", "fp16", "ls", "transfer",
    "network", "class", "S_churn", "S_min", "S_max", "S_noise",
    # tensorboard
    "logdir",
    # torchrun
    "nproc_per_node", "nproc-per-node", "nnodes", "node-rank", "master-addr", "master-port", "max-restarts",
    # SLURM's sbatch, srun and scancel
    "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "signal", "requeue", "open-mode", "mpi",
    # py-spy and pip
    "pid", "no-deps",
    # a placeholder
    "flag",
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def known_flags(folders: tuple[str, ...] = CODE_FOLDERS) -> set[str]:
    """The flags of all commands and their aliases: fields of config classes and arguments of parsers.

    The source code is parsed rather than imported, which would take seconds.
    """
    found = {"help", "config", "dry_run"}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found |= argument_names(node)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                found |= option_names(node)
    return found


def argument_names(call: ast.Call) -> set[str]:
    """The flags of `parser.add_argument("--name", ...)`."""
    if getattr(call.func, "attr", "") != "add_argument":
        return set()
    words = [each.value for each in call.args if isinstance(each, ast.Constant)]
    return {word.removeprefix("--") for word in words if word.startswith("--")}


def option_names(field: ast.AnnAssign) -> set[str]:
    """The flags of `name: type = option(..., aliases=("other",))`."""
    if getattr(field.value.func, "id", "") != "option":
        return set()
    aliases = [each.value for each in field.value.keywords if each.arg == "aliases"]
    return {field.target.id, *(name for each in aliases for name in ast.literal_eval(each))}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page):
    for path in PATHS.findall(text_of(page)):
        assert (ROOT / path).exists(), f"{name_of(page)}: {path} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_exist(page):
    for link in LINKS.findall(text_of(page)):
        target, _, anchor = link.partition("#")
        if not target.startswith(("http://", "https://", "mailto:")):
            file = page.parent / target if target else page
            assert file.exists(), f"{name_of(page)} links to {link}"
            assert not anchor or anchor in anchors(file), f"{name_of(page)} links to {link}: no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "RESULTS.md"], ids=name_of)
def test_flags_exist(page):
    text = text_of(page)
    unknown = {*FLAGS.findall(text)} - known_flags() - FOREIGN_FLAGS - {*OWN_FLAGS.findall(text)}
    assert not unknown, f"{name_of(page)} names flags that no command has: {sorted(unknown)}"


@pytest.mark.parametrize("folder", ["cm", "scripts", "evaluations", "datasets"])
def test_messages_name_flags_that_exist(folder):
    """Of a command that is installed: a remedy that nobody has is none."""
    known = known_flags(("scripts", "evaluations", "datasets", "cm/config"))
    others = {word.removeprefix("--") for word in FLAGS_OF_OTHER_TOOLS} | FOREIGN_FLAGS | {"standalone"}    # torchrun's
    unknown = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = FLAGS.findall(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            if missing := {*words} - known - others:
                unknown[f"{path.relative_to(ROOT)}:{node.lineno}"] = sorted(missing)
    assert not unknown


def test_the_list_of_foreign_flags_is_as_short_as_possible():
    named = {flag for page in PAGES for flag in FLAGS.findall(text_of(page))}
    assert named >= FOREIGN_FLAGS, sorted(FOREIGN_FLAGS - named)
    assert not FOREIGN_FLAGS & known_flags()


def test_every_page_is_listed():
    index = {(ROOT / "docs" / link).resolve() for link in LINKS.findall(text_of(ROOT / "docs/README.md"))}
    assert {*(ROOT / "docs").glob("*.md")} - {ROOT / "docs/README.md"} <= index


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
