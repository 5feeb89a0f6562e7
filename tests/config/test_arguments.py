"""A function of a configuration is called as if it listed the fields itself."""

import inspect
from dataclasses import dataclass

import pytest

from cm.config.arguments import method_takes_fields, shared_fields, takes_fields


@dataclass(frozen=True)
class Point:
    x: float
    y: float = 2.0


@dataclass(frozen=True)
class Labelled:
    name: str
    y: float


@takes_fields(Point)
def total(point):
    """The sum."""
    return point.x + point.y


class Line:
    @method_takes_fields(Point)
    def __init__(self, end):
        self.end = end


def test_fields_are_given_by_position_by_name_or_by_default():
    assert total(1.0) == 3 and total(1.0, 5.0) == 6 and total(y=4.0, x=1.0) == 5
    assert Line(1.0, y=3.0).end == Point(1.0, 3.0)


def test_the_signature_is_the_list_of_fields():
    assert list(inspect.signature(total).parameters) == ["x", "y"] == list(inspect.signature(Line).parameters)
    assert inspect.signature(total).parameters["y"].default == 2.0
    assert total.__name__ == "total" and total.__doc__ == "The sum."


@pytest.mark.parametrize("call, message", [
    (lambda: total(1.0, z=2.0), r"total\(\) got an unexpected keyword argument 'z'"),
    (lambda: total(), r"total\(\) missing a required argument: 'x'"),
    (lambda: Line(1.0, 2.0, 3.0), r"Line.__init__\(\) too many positional arguments"),
])
def test_a_wrong_call_names_the_function_that_was_called(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_what_two_configurations_share_is_handed_over_by_name():
    assert shared_fields(Labelled, Point(1.0, 4.0)) == {"y": 4.0}
