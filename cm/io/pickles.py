"""Stand-ins that readers of untrusted pickles build instead of objects and functions: nothing in a pickle is run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any


class Record:
    """An object of a class that is not here: its contents, and the name of the class where the pickle holds it."""

    class_name = ""
    state: Mapping[str, Any] = {}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.state = state


class Call:
    """A function that a pickle may call but not change: pickles can set attributes of any object they get."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it tries to change {self.function.__name__}")
