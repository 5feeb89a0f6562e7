"""NumPy scalars and arrays in a pickle, rebuilt as data: stand-ins for the functions that such a pickle calls."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np


class NumberType:
    """numpy.dtype of a plain number, such as f8."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        if name not in ("b1", "i4", "i8", "f4", "f8"):
            raise pickle.UnpicklingError(f"a numpy number of type {name!r}")
        self.name, self.byte_order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"a numpy number of byte order {state[1]!r}")
        self.byte_order = state[1]


def number(kind: NumberType, content: bytes) -> float | int | bool:
    """A numpy scalar as a Python number."""
    return np.frombuffer(content, kind.byte_order + kind.name)[0].item()


class Array:
    """A numpy array beside the network, such as the scale of an encoder's latents: its bytes, and what they are."""

    kind: Any = None
    content: Any = b""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, _, self.kind, _, self.content = state

    def numbers(self) -> np.ndarray:
        """Its numbers in one row, float64; none unless they are floats."""
        if not isinstance(self.kind, NumberType) or self.kind.name not in ("f4", "f8"):
            return np.zeros(0)
        if not isinstance(self.content, bytes) or len(self.content) % int(self.kind.name[1]):
            return np.zeros(0)
        return np.frombuffer(self.content, self.kind.byte_order + self.kind.name).astype(np.float64)


def array(kind: Any, shape: tuple[int, ...], code: bytes) -> Array:
    """What numpy's `_reconstruct` is called with."""
    return Array()
