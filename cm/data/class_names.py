"""The names of classes: which number means which, compared between data and checkpoints, and looked up for sampling.

A network knows classes by number, and the numbers come from the names in a folder: another folder, other numbers. So
the list of names, whose positions are the numbers, travels with data sets and checkpoints. An empty list means that the
names are not known; then numbers are all there is, and nothing is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cm.errors import UserError, did_you_mean
from cm.io.terminal import printable

ClassNames = tuple[str, ...]

CLASS_NAMES = "class_names"                     # of an npz, of dataset.json, of the metadata of safetensors
KEPT_BYTES = 4 * 2**20                          # a longer list of names is not kept with checkpoints
SHOWN = 10                                      # names in a message
ANY = -1                                        # the class number that stands for a random class


def checked(names: Any, least: int = 0) -> ClassNames:
    """A list of names out of a file.

    :param least: as many classes have an image.
    :raises ValueError: if it is no list of different words, or too short.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is not a list of names")
    if len(set(names)) < len(names):
        raise ValueError("class_names has a name twice")
    if names and len(names) < least:
        raise ValueError(f"class_names has {len(names)} names, and there are {least} classes")
    return tuple(names)


def worth_keeping(names: ClassNames) -> ClassNames:
    """The names that go into a checkpoint: none if they would be most of it."""
    return names if sum(map(len, names)) <= KEPT_BYTES else ()


def numbered_as(labels: np.ndarray, own: ClassNames, names: ClassNames, source: str) -> np.ndarray:
    """Class numbers [N] of a data set as the numbers that a network has for the classes of the same names.

    :param own, names: of the data set and of the network; where one is not known, the numbers are what they are.
    :raises UserError: for a class that the network does not have.
    """
    if not own or not names or own == names:
        return labels
    places = {name: number for number, name in enumerate(names)}
    strangers = [own[number] for number in np.unique(labels) if own[number] not in places]
    if strangers:
        raise UserError(
            f"{source} has images of {shortened(strangers)}, but the network has the classes {shortened(names)}; "
            "choose one of these with --class_label"
        )
    return np.array([places.get(name, ANY) for name in own], np.int64)[labels]


def shortened(names: Sequence[str], around: int = 0) -> str:
    """'cat, dog' or 'cat, dog, ... (1000 classes)'.

    :param around: a position that must be seen.
    """
    start = max(0, min(around - SHOWN // 2, len(names) - SHOWN)) if around >= SHOWN else 0
    words = [printable(name) or '""' for name in names[start : start + SHOWN]]
    text = ", ".join([*["..."][: start > 0], *words, *["..."][: start + SHOWN < len(names)]])
    return text if len(words) == len(names) else f"{text} ({len(names)} classes)"


def require_same(known: ClassNames, found: ClassNames, checkpoint: str, data: str, allowed: bool = False) -> str:
    """Refuse to go on from a checkpoint with data whose numbers mean other classes.

    :param known: the names in the checkpoint.
    :param found: the names in the data.
    :param checkpoint, data: how messages name the two.
    :param allowed: whether a difference is only a warning.
    :returns: a warning for the log, empty where all is as it was.
    :raises UserError: if the lists differ and that is not allowed.
    """
    if known and not found:
        return (f"{data} does not name its classes, so nothing tells whether class 0 is still {known[0]!r}: the "
                f"checkpoint {checkpoint} knows {shortened(known)}. Name them in its dataset.json (class_names), or "
                "check that the numbers are the same")
    if not known or known == found:
        return ""
    longest = max(len(known), len(found))
    first = next(i for i in range(longest) if known[i : i + 1] != found[i : i + 1])
    was, now = ((repr(names[first]) if first < len(names) else "no class") for names in (known, found))
    text = (
        f"the classes of {data} are not those of {checkpoint}. The checkpoint: {shortened(known, first)}; the data: "
        f"{shortened(found, first)}. Class {first} was {was} and is now {now}"
    )
    if allowed:
        return f"{text}; continuing because of --allow_other_classes"
    raise UserError(
        f"{text}: a network would learn one class under the number of another. Give the data that the checkpoint was "
        "trained on (same names, none missing), or start a new run in another --log_dir; to continue anyway, with "
        "the class numbers of the data, give --allow_other_classes True"
    )


def numbers_of(words: str, names: ClassNames, num_classes: int, flag: str = "--class_label") -> tuple[int, ...]:
    """The classes that a flag lists by name or number: 'cat', '3', 'cat,3'; none for -1.

    A whole number is a class number; only if there is no such class, or it is no number, is it looked for among the
    names. A name with a comma in it is found when it stands alone.

    :raises UserError: for what is neither, with the names that there are.
    """
    if words.strip() in names and not _is_number(words.strip()):
        return (names.index(words.strip()),)
    parts = [part.strip() for part in words.split(",")]
    if parts == [str(ANY)]:
        return ()
    found = tuple(_number_of(part, words, names, num_classes, flag) for part in parts)
    if len(set(found)) < len(found):
        raise UserError(f"{flag} {printable(words)} names a class twice; name each once")
    return found


def _is_number(word: str) -> bool:
    return word.isascii() and word.removeprefix("-").isdigit()


def _number_of(word: str, words: str, names: ClassNames, num_classes: int, flag: str) -> int:
    if _is_number(word) and 0 <= int(word) < num_classes:
        return int(word)
    if word in names:
        return names.index(word)
    if _is_number(word) and int(word) < 0:
        alone = f" ({ANY}, random classes, stands alone)" if int(word) == ANY else ""
        raise UserError(f"{flag} {printable(words)}: {word} is too small; the least class is 0{alone}")
    shown = f"{flag} {printable(words)}" + (f": {word!r}" if word != words else "")
    if not names:
        numbers = "" if _is_number(word) else "; this model has no class names, so give numbers"
        raise UserError(f"{shown}: the model has classes 0 to {num_classes - 1}{numbers}")
    raise UserError(
        f"{shown} is none of the model's classes 0 to {num_classes - 1}: {shortened(names)}.{did_you_mean(word, names)}"
    )


def number_of_name(word: str, names: ClassNames) -> int:
    """The class of a name alone, also of one that is a number or holds a comma.

    :raises UserError: if there is none.
    """
    if word in names:
        return names.index(word)
    known = "this model has no class names, so give numbers"
    if names:
        known = f"the classes are {shortened(names)}.{did_you_mean(word, names)}"
    raise UserError(f"no class is named {printable(word)!r}: {known}")


def named(number: int, names: ClassNames) -> str:
    """'3 (cat)', or '3' where it has no name of its own."""
    name = printable(names[number]) if number < len(names) else str(number)
    return str(number) if name == str(number) else f"{number} ({name})"
