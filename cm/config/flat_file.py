"""Files of flags in YAML or JSON, parsed into plain values; nothing in them is ever executed."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any


class Whole(int):
    """A whole number in a file, and how it is written there: to a flag that takes words, 1_000 is not 1000."""

    text: str

    def __new__(cls, text: str) -> Whole:
        """:raises ValueError: for text that only YAML reads as another number: 010 as 8, 1:30 as 90."""
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):
            raise ValueError(f"{text} is ambiguous as a whole number: write it with the digits 0 to 9 "
                             f'and no leading 0, or in quotes, "{text}", if it is a word')
        self = super().__new__(cls, text)
        self.text = text
        return self

    def __str__(self) -> str:
        return self.text


class Fraction(float):
    """A number with a point or an exponent in a file, and how it is written there."""

    text: str

    def __new__(cls, text: str) -> Fraction:
        """:raises ValueError: as `Whole`."""
        if ":" in text:
            raise ValueError(f'{text} is ambiguous as a number: write it with the digits 0 to 9 and a '
                             f'point, or in quotes, "{text}", if it is a word')
        self = super().__new__(cls, re.sub(r"\.(?=inf|nan)", "", text.lower().replace("_", "")))
        self.text = text
        return self

    def __str__(self) -> str:
        return self.text


@cache
def _loader() -> Any:
    """PyYAML's safe loader, but numbers and dates are read as on a command line, not as in YAML 1.1."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def construct(kind: type, loader: Any, node: Any) -> Any:
        try:
            return kind(loader.construct_scalar(node))
        except ValueError as error:
            raise ValueError(f"line {node.start_mark.line + 1}: {error}") from None

    Loader.add_constructor("tag:yaml.org,2002:int", partial(construct, Whole))
    Loader.add_constructor("tag:yaml.org,2002:float", partial(construct, Fraction))
    Loader.add_constructor("tag:yaml.org,2002:timestamp", partial(construct, str))
    return Loader


def parse_flat(text: bytes) -> Any:
    """A mapping of plain values and lists of them, from YAML or JSON; {} for an empty text.

    Numbers are `Whole` and `Fraction`, which are written as they are in the file.

    :raises ValueError: if it is neither, nested deeper, gives a key twice or none a value, has aliases, by which a
        short text unfolds to a huge one, or a number that means more than one.
    """
    import yaml

    try:
        depth, scalars, lines = 0, 0, {}
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = f"line {event.start_mark.line + 1}"
            if depth > 2:
                raise ValueError(f"{line}: a value is a word, a number or a list of those")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{line}: aliases (*{event.anchor}) are not read")
            if depth == 1 and isinstance(event, (yaml.ScalarEvent, yaml.CollectionEndEvent)):
                scalars += 1                                # at this depth keys and values take turns
                if scalars % 2 and isinstance(event, yaml.ScalarEvent):
                    if event.value in lines:
                        raise ValueError(f"{line}: {event.value} is given twice, first in {lines[event.value]}")
                    lines[event.value] = line
        content = yaml.load(text, _loader()) or {}
        for name, value in content.items() if isinstance(content, dict) else ():
            if value is None:
                line = lines.get(str(name), "some line")
                raise ValueError(f"{line}: {name} has no value; write \"\" for an empty one")
        return content
    except MemoryError:
        raise
    except Exception as error:                              # such as of a date that the calendar does not have
        raise ValueError(str(error) or repr(error)) from None
