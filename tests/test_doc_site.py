"""The site of docs/ builds with every link leading somewhere, and the API page lists what exists, with types."""

import importlib
import inspect
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from support.as_module import as_module

ROOT = Path(__file__).resolve().parents[1]
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^::: ([\w.]+)$", API, re.MULTILINE)
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def made(site, **changes):
    """Build the site as `make docs` does; mkdocs stops at the first warning's end."""
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), strict=True, **changes)
    try:
        build(config)
    finally:
        logging.getLogger("mkdocs").handlers.clear()


def found(name):
    """What a dotted name stands for."""
    module, parts = name, []
    while True:
        try:
            value = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            parts.insert(0, last)
    for part in parts:
        value = getattr(value, part)
    return value


def pages(entries):
    for entry in entries:
        yield from [entry] if isinstance(entry, str) else pages(*entry.values())


def test_the_site_builds(tmp_path):
    made(tmp_path)
    page = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert f'id="{name}"' in page, name
    assert "if there is no such file, it is damaged" in page, "from the docstring of cm.load"
    assert "changes (<code>CHANGELOG.md</code>)" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'href="(\.\./)+(configs|datasets|benchmarks)', page)


@pytest.mark.parametrize("text, message", [
    ("[a](nowhere.md)", None), ("[a](README.md#nowhere)", None), ("::: cm.nothing", None),
    ("[a](../nowhere.md)", "links to ../nowhere.md, which is not there"),
])
def test_what_leads_nowhere_is_an_error(tmp_path, text, message):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "README.md").write_text(f"# Page\n\n{text}\n")
    with pytest.raises(FileNotFoundError if message else (Abort, SystemExit), match=message):
        made(tmp_path / "site", docs_dir=str(docs), nav=["README.md"])


def test_links_to_the_repository_become_names():
    hooks = as_module(ROOT / "tools/docs_hooks.py")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="README.md"))
    text = "[changes](../CHANGELOG.md) and [`cm/types.py`](../cm/types.py), [here](runs.md)"
    assert hooks.on_page_markdown(text, page) == "changes (`CHANGELOG.md`) and `cm/types.py`, [here](runs.md)"


def test_every_page_is_in_the_navigation():
    listed = list(pages(NAV))
    assert len(set(listed)) == len(listed)
    assert set(listed) == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_index_lists_the_pages_as_the_navigation_does():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    sections = {part.splitlines()[0]: re.findall(r"^\| \[([\w-]+\.md)\]\(\1\) \|", part, re.MULTILINE)
                for part in index.split("\n## ")[1:]}
    navigation = {name: names for entry in NAV if isinstance(entry, dict) for name, names in entry.items()}
    assert sections == navigation


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_page_has_types_and_a_docstring(name):
    value = found(name)
    members = re.search(rf"^::: {re.escape(name)}\n    options:\n      members: \[(.*?)\]", API, re.MULTILINE)
    listed = [getattr(value, member) for member in members[1].split(", ")] if members else []
    for each in [value, *listed]:
        text, function = inspect.getdoc(each), each.fget if isinstance(each, property) else each
        assert text, f"{each} has no docstring"
        if not inspect.isfunction(function):
            continue
        signature = inspect.signature(function)
        bare = [parameter for parameter in signature.parameters.values()
                if parameter.name != "self" and parameter.annotation is parameter.empty]
        assert not bare and signature.return_annotation is not signature.empty, f"{each} lacks types: {bare}"
