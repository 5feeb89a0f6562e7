"""Looking a name up in a table, and what is said of a name that is not there."""

import pytest

from cm.errors import UserError
from cm.registry import lookup

TABLE = {"heun": 1, "euler": 2, "onestep": None}


def test_a_name_of_the_table_gives_its_entry_even_if_that_is_none():
    assert lookup(TABLE, "euler") == 2 and lookup(TABLE, "onestep") is None


def test_a_name_that_is_near_another_gets_a_suggestion_and_the_choices():
    with pytest.raises(UserError, match="^unknown sampler 'huen'; choose one of: heun, .*. Did you mean 'heun'[?]$"):
        lookup(TABLE, "huen", "sampler")


def test_a_name_that_is_near_none_gets_the_choices_alone():
    with pytest.raises(UserError, match="^unknown name 'xyz'; choose one of: heun, euler, onestep.$"):
        lookup(TABLE, "xyz")
    with pytest.raises(UserError, match="unknown name None"):
        lookup(TABLE, None)
