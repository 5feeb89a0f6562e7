"""A check of the operations of a pickle before any of them is executed.

Python's own reader trusts the sizes that a pickle declares, and hashes every key: a tuple that contains another one
twice, sixty levels deep, is 200 bytes long, and hashing it takes for ever. Here the operations are followed on a stack
that holds only how large and how deep each value is.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any, NamedTuple

from cm.io.budget import PICKLE, Budget, Meter

PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
GETS = ("GET", "BINGET", "LONG_BINGET")
CHANGES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
"""Operations that change the first of the values that they take."""


class Value(NamedTuple):
    """The known facts about a value."""

    nodes: int = 1                                          # values in it, shared ones as often as they are reached
    depth: int = 1
    plain: Any = None                                       # a number, a text, a global's name, or a tuple of those


MARK = Value(0, 0)


def scan(file: IO[bytes], budget: Budget = PICKLE) -> list[Any]:
    """Follow the operations of one pickle, and leave the file behind its end.

    :return: what it calls persistent: the references to data outside of it, as far as they are plain.
    :raises ValueError: if it is no pickle, ends too early, or asks for more than the budget.
    """
    meter, stack, memo, persistent = Meter(budget), [], {}, []
    try:
        for operation, argument, _ in pickletools.genops(file):
            meter.spend()
            name = operation.name
            if name in PUTS:
                index = len(memo) if argument is None else argument
                if not 0 <= index <= meter.nodes:           # the reader makes a table of that length
                    raise ValueError(f"its memo has a place {index}")
                memo[index] = stack[-1]
            elif name in GETS:
                stack.append(memo[argument])
            elif name == "DUP":
                stack.append(stack[-1])
            elif name == "MARK":
                stack.append(MARK)
            else:
                values = _take(stack, operation)
                result = _result(name, argument, values)
                if result.nodes > budget.nodes:
                    raise ValueError(f"it has more than {budget.nodes:,} values")
                meter.descend(result.depth)
                stack += [result] * len(operation.stack_after)
                if name in ("PERSID", "BINPERSID"):
                    persistent.append(values[0].plain if values else argument)
    except (IndexError, KeyError) as error:
        raise ValueError(f"it uses a value that does not exist ({error!r})") from None
    return persistent


def _take(stack: list[Value], operation: pickletools.OpcodeInfo) -> list[Value]:
    """Remove what an operation takes off the stack, in order."""
    before, values = list(operation.stack_before), []
    if pickletools.markobject in before:
        while (value := stack.pop()) is not MARK:
            values.append(value)
        before = before[: before.index(pickletools.markobject)]
    return [*reversed([*values, *(stack.pop() for _ in before)])]


def _result(name: str, argument: Any, values: list[Value]) -> Value:
    """The result of an operation on values."""
    nodes = 1 + sum(value.nodes for value in values)
    if name in CHANGES and values:
        return Value(nodes, max(values[0].depth, 1 + max((value.depth for value in values[1:]), default=0)))
    depth = 1 + max((value.depth for value in values), default=0)
    if name.endswith("GLOBAL") or name.startswith("TUPLE"):
        plain = argument if name == "GLOBAL" else tuple(value.plain for value in values)
    else:
        plain = argument if isinstance(argument, (int, str)) else None
    return Value(nodes, depth, plain)
