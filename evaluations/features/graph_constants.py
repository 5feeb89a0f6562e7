"""The constants of a TensorFlow graph in a .pb file, read without TensorFlow.

A protocol buffer is a sequence of fields: a key (number << 3 | wire type), then a varint, 4 or 8 bytes, or a length and
that many bytes. Only the few fields that lead to a float constant are looked at:
GraphDef.node = 1; NodeDef.name = 1, .op = 2, .attr = 5 (key = 1, value = 2); AttrValue.tensor = 8;
TensorProto.dtype = 1, .tensor_shape = 2, .tensor_content = 4, .float_val = 5; TensorShapeProto.dim = 2, .size = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cm.errors import UserError
from cm.io.budget import GRAPH, Meter, read_bytes

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5                # wire types
FIXED_SIZES = {FIXED64: 8, FIXED32: 4}
DT_FLOAT = 1
MAX_AXES = 32                                               # of an array of numpy
VARINT_BITS = 70                                            # of ten bytes, the longest


def read_constants(path: str) -> dict[str, NDArray[np.float32]]:
    """The float32 constants of a frozen graph by node name.

    :raises UserError: if the file is missing, or is no graph.
    """
    try:
        graph = memoryview(read_bytes(path, GRAPH))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"the graph {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"the graph {path} cannot be read: {error}") from None
    constants, meter = {}, Meter(GRAPH)
    try:
        for number, node in fields(graph, meter):
            if number == 1:
                name, tensor = read_node(_message(node), meter)
                if tensor is not None:
                    constants[name] = tensor
    except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not a TensorFlow graph, or is damaged ({error})") from None
    return constants


def read_node(node: memoryview, meter: Meter) -> tuple[str, NDArray[np.float32] | None]:
    """The name of a NodeDef, and its value if it is a float constant."""
    name, op, tensor = "", "", None
    for number, value in fields(node, meter):
        if number == 1:
            name = bytes(_message(value)).decode()
        elif number == 2:
            op = bytes(_message(value)).decode()
        elif number == 5:
            entry = dict(fields(_message(value), meter))
            if bytes(_message(entry[1])) == b"value":
                tensor = dict(fields(_message(entry[2]), meter)).get(8)
    return name, read_tensor(_message(tensor), meter) if op == "Const" and tensor is not None else None


def read_tensor(tensor: memoryview, meter: Meter) -> NDArray[np.float32] | None:
    """A TensorProto of floats, or None for another type.

    :param meter: of the values that are not in the file: a single one may stand for many.
    """
    dtype: int | memoryview | None = None
    shape: tuple[int, ...] = ()
    content: memoryview | None = None
    listed: list[NDArray[np.float32]] = []
    for number, value in fields(tensor, meter):
        if number == 1:
            dtype = value
        elif number == 2:
            dims = [_message(dim) for key, dim in fields(_message(value), meter) if key == 2]
            sizes = [dict(fields(dim, meter)).get(1, 0) for dim in dims]
            shape = tuple(size for size in sizes if isinstance(size, int))
            if len(shape) > MAX_AXES:
                raise ValueError(f"a constant has {len(shape)} axes")
        elif number == 4:
            content = _message(value)
        elif number == 5:                                   # packed, or one by one
            listed.append(np.frombuffer(_message(value), "<f4"))
    if dtype != DT_FLOAT:
        return None
    values = np.frombuffer(content, "<f4") if content is not None else np.concatenate(listed or [np.zeros(1, "<f4")])
    count = math.prod(shape)
    if len(values) < count:                                 # the last value stands for all that follow
        meter.spend(count - len(values))
        values = np.concatenate([values, np.repeat(values[-1:], count - len(values))])
    return values.reshape(shape).astype(np.float32)         # a copy of its own, which torch may take


def _message(value: int | memoryview) -> memoryview:
    """:raises TypeError: for a number where a message or a text should be."""
    if isinstance(value, int):
        raise TypeError("a number where a message should be")
    return value


def fields(message: memoryview, meter: Meter) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: number, and an int or the bytes.

    :raises IndexError, ValueError: if it is no message, or the budget is used up.
    """
    at = 0
    while at < len(message):
        meter.spend()
        key, at = varint(message, at)
        kind = key & 7
        if kind == VARINT:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if kind == BYTES else (FIXED_SIZES.get(kind), at)
            if size is None or at + size > len(message):
                raise ValueError(f"no field can begin at byte {at}")
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """The integer at a place, and the place behind it.

    :raises IndexError, ValueError: if none ends there.
    """
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift >= VARINT_BITS:
            raise ValueError(f"the number before byte {at} has no end")
