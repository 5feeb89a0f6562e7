"""What mkdocs needs to know of docs/: its pages also link to files of the repository, which the site does not have."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"!?\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")   # that leads out of docs/
DOCS = Path(__file__).resolve().parents[1] / "docs"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page with links to the repository as names of its files.

    :raises FileNotFoundError: for a link to a file that is not there.
    """
    return LINK.sub(lambda link: without_link(link, page.file.src_uri), markdown)


def without_link(link: re.Match[str], page: str) -> str:
    """'[changes](../CHANGELOG.md)' -> 'changes (CHANGELOG.md)'."""
    place = os.path.normpath(DOCS / Path(page).parent / link[2])
    if not os.path.exists(place):
        raise FileNotFoundError(f"docs/{page} links to {link[2]}, which is not there")
    name = os.path.relpath(place, DOCS.parent)
    return f"{link[1]} (`{name}`)" if link[1] not in (name, f"`{name}`") else f"`{name}`"
