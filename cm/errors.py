"""The error for a mistake of the user, which every command reports as one message, and its hint for a wrong name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

SYNONYMS = {"gpu": "cuda", "float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
"""What people call a choice -> the choice."""


class UserError(ValueError):
    """A mistake of the user, shown as one message with its remedy and without a traceback."""


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """The end of a message about a word that is none of the names: " Did you mean 'heun'?", or nothing."""
    known, text = list(names), str(word)
    near = [SYNONYMS[text]] if SYNONYMS.get(text) in known else get_close_matches(text, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
