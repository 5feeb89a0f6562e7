"""Command lines for tests that take a usual one and change a part of it."""

from collections.abc import Iterable


def overridden(words: Iterable[object]) -> list[str]:
    """The words of a command line, where a later --flag VALUE takes the place of an earlier one."""
    pairs: dict[str, list[str]] = {"": []}
    name = ""
    for word in map(str, words):
        if word.startswith("--"):
            name = word
            pairs[name] = []
        else:
            pairs[name].append(word)
    first = pairs.pop("")
    return [*first, *(word for flag, values in pairs.items() for word in (flag, *values))]
