"""The card of a model: a README.md with tags that model hubs read, made from the files of its run.

Every value that a run or a user gives is escaped: in the front matter by the YAML library, in the text by `plain` and
`code`. assets/card.md.j2 arranges them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cm.io.terminal import printable
from cm.report.run_facts import RunFacts

ASSETS = Path(__file__).parent / "assets"
CLASSES_SHOWN, NAME_LENGTH = 100, 200                               # names of classes; characters of any text
NO_LICENCE = "unknown"                                              # the hub's word for it
SPECIAL = re.compile(r"([\\`*_\[\]{}()#|~!@$:])")                    # of Markdown, with its links and mentions
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


@dataclass(frozen=True)
class Card:
    """What a card says.

    :param config: flags of the network, and training_mode.
    :param few_steps: whether it is a consistency model or another few-step model.
    :param picture: the name of a file with samples next to the card; empty for none.
    :param licence: an identifier such as mit or cc-by-4.0; empty: not chosen.
    """

    title: str
    config: Mapping[str, Any]
    class_names: Sequence[str]
    facts: RunFacts
    few_steps: bool
    parameters: int
    picture: str = ""
    licence: str = ""


def render(card: Card) -> str:
    """The text of README.md."""
    environment = Environment(loader=FileSystemLoader(ASSETS), undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"plain": plain, "code": code}
    names = list(card.class_names)
    return environment.get_template("card.md.j2").render(
        front=front_matter(card), card=card, config=card.config, facts=card.facts, names=names[:CLASSES_SHOWN],
        more_names=max(0, len(names) - CLASSES_SHOWN), kind="few-step model" if card.few_steps else "diffusion model",
        licence=card.licence or NO_LICENCE,
    )


def front_matter(card: Card) -> str:
    """The metadata for model hubs: YAML between two lines of three dashes."""
    conditional = bool(card.config.get("class_cond"))
    mode = str(card.config.get("training_mode", ""))
    tags = ["consistency-toolkit", "pytorch", "diffusion", "image-generation", mode]
    content = {
        "license": printable(card.licence)[:NAME_LENGTH] or NO_LICENCE,
        "library_name": "consistency-toolkit",
        **({} if conditional else {"pipeline_tag": "unconditional-image-generation"}),
        "tags": [printable(tag)[:NAME_LENGTH] for tag in tags if tag]
        + (["few-step"] if card.few_steps else []) + (["class-conditional"] if conditional else []),
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10**6)


def plain(value: Any) -> str:
    """A value as text of one line that Markdown and HTML show as it is."""
    text = printable(str(value))
    text = text if len(text) <= NAME_LENGTH else text[:NAME_LENGTH] + "..."
    return "".join(ENTITIES.get(letter, letter) for letter in SPECIAL.sub(r"\\\1", text))


def code(text: str) -> str:
    """A block of code with this text, whatever it holds."""
    lines = [printable(line) for line in text.split("\n")]
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence, *lines, fence])
