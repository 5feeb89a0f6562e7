"""Functions that are called with many published arguments, but take them as one dataclass.

The fields of the dataclass are the arguments, in their published order. The implementation takes one object, and passes
parts of it to other dataclasses by the names of their fields.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
Self = TypeVar("Self")
Config = TypeVar("Config")
Result = TypeVar("Result")


def takes_fields(kind: Callable[P, Config]) -> Callable[[Callable[[Config], Result]], Callable[P, Result]]:
    """Decorator: call a function of a dataclass with the fields of it, by position or by name.

    :raises TypeError: by the function, for an argument that is no field, or a field without default that is missing.
    """

    def decorate(function: Callable[[Config], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            return function(_made(kind, call, args, kwargs))

        call.__signature__ = inspect.signature(kind)        # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


def method_takes_fields(
    kind: Callable[P, Config],
) -> Callable[[Callable[[Self, Config], Result]], Callable[Concatenate[Self, P], Result]]:
    """`takes_fields` for a method."""

    def decorate(method: Callable[[Self, Config], Result]) -> Callable[Concatenate[Self, P], Result]:
        @functools.wraps(method)
        def call(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            return method(self, _made(kind, call, args, kwargs))

        own, fields = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), inspect.signature(kind)
        signature = fields.replace(parameters=[own, *fields.parameters.values()])
        call.__signature__ = signature                      # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


def _made(kind: Callable[..., Config], function: Callable[..., Any], args: Any, kwargs: Any) -> Config:
    """The dataclass; a wrong call is reported under the name that was called."""
    try:
        inspect.signature(kind).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{function.__qualname__}() {error}") from None
    return kind(*args, **kwargs)


def shared_fields(kind: type, config: Any) -> dict[str, Any]:
    """The values of those fields of a dataclass that another one, `kind`, has too: its keyword arguments."""
    wanted = {field.name for field in dataclasses.fields(kind)}
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name in wanted}
